"""The public names, all at once; `triojobs` imports this module when the first of them is used."""

try:
    import psycopg as _psycopg
except ImportError as _exc:
    raise ImportError('triojobs needs psycopg with libpq; run: pip install "triojobs[binary]"') from _exc

from ._admin import Admin as Admin
from ._admin import open_admin as open_admin
from ._admin_model import Attempt as Attempt
from ._admin_model import BulkResult as BulkResult
from ._admin_model import Explanation as Explanation
from ._admin_model import GroupInfo as GroupInfo
from ._admin_model import GroupState as GroupState
from ._admin_model import JobDetails as JobDetails
from ._admin_model import JobFilter as JobFilter
from ._admin_model import JobSummary as JobSummary
from ._admin_model import Page as Page
from ._admin_model import Quantiles as Quantiles
from ._admin_model import QueueInfo as QueueInfo
from ._admin_model import Reason as Reason
from ._admin_model import Statistic as Statistic
from ._backoff import Backoff as Backoff
from ._client import Client as Client
from ._codec import CborCodec as CborCodec
from ._codec import Codec as Codec
from ._codec import EncodeError as EncodeError
from ._codec import JsonCodec as JsonCodec
from ._codec import PydanticCodec as PydanticCodec
from ._errors import CodecError as CodecError
from ._errors import DatabaseError as DatabaseError
from ._errors import DuplicateJobError as DuplicateJobError
from ._errors import GroupNotFoundError as GroupNotFoundError
from ._errors import JobCancelledError as JobCancelledError
from ._errors import JobFailedError as JobFailedError
from ._errors import JobNotFoundError as JobNotFoundError
from ._errors import Kill as Kill
from ._errors import LeaseLostError as LeaseLostError
from ._errors import OptionError as OptionError
from ._errors import RetryAfter as RetryAfter
from ._errors import SchemaError as SchemaError
from ._errors import Snooze as Snooze
from ._errors import StaleClaimError as StaleClaimError
from ._errors import TriojobsError as TriojobsError
from ._group import WorkerGroup as WorkerGroup
from ._job import Job as Job
from ._model import Enqueued as Enqueued
from ._model import GroupStatistics as GroupStatistics
from ._model import HardStop as HardStop
from ._model import JobInfo as JobInfo
from ._model import JobStatus as JobStatus
from ._model import ShutdownReport as ShutdownReport
from ._open import open_client as open_client
from ._open import open_worker_group as open_worker_group
from ._outbox import enqueue_many_on as enqueue_many_on
from ._outbox import enqueue_on as enqueue_on
from ._outbox import try_enqueue_many_on as try_enqueue_many_on
from ._outbox import try_enqueue_on as try_enqueue_on
from ._queue import JobOptions as JobOptions
from ._queue import NewJob as NewJob
from ._queue import Queue as Queue
from ._queue import Worker as Worker
from ._retention import Pruned as Pruned
from ._retention import Retention as Retention
from ._serve import serve as serve
from ._sql.schema import migrate as migrate
from ._sql.schema import verify_schema as verify_schema
from ._sync_admin import SyncAdmin as SyncAdmin
from ._sync_admin import admin_on as admin_on
from ._sync_client import SyncClient as SyncClient
from .embedded import open_embedded_postgres as open_embedded_postgres
