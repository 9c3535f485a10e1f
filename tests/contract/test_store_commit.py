"""commit_work: the handler's writes, its follow-ups and its end in one transaction."""

from __future__ import annotations

from typing import Any

import pytest
from contract_rig import NUMBERS, Group, enqueue_one, number_of, read, status

import triojobs
from triojobs._errors import DuplicateJobError, StaleClaimError
from triojobs._model import Claim, Outcome
from triojobs._store import Store

AUDIT: triojobs.Queue[int, Any] = triojobs.Queue("audit", int)


def encode(value: int) -> tuple[bytes, str]:
    return NUMBERS.encode_result(value), "cbor"


class Port:
    """Counts what the store reports as committed."""

    def __init__(self) -> None:
        self.commits = 0

    def committed(self) -> None:
        self.commits += 1


@pytest.fixture
def port() -> Port:
    return Port()


@pytest.fixture
async def claim(store: Store, group: Group) -> Claim:
    await enqueue_one(store, number=1)
    return await group.claim_one()


def enqueue_audit(conn: Any) -> int:
    return triojobs.enqueue_on(conn, AUDIT, 5)


async def test_writes_follow_ups_and_the_end_commit_together(
    store: Store, group: Group, claim: Claim, port: Port
) -> None:
    follow_up = await store.commit_work(claim, enqueue_audit, encode, port.committed)
    assert port.commits == 1
    job = await read(store, claim.job_id)
    assert (job.status, job.result, job.result_encoding) == ("done", *encode(follow_up))
    assert (job.group_id, job.attempts) == (group.id, 1)
    assert [number_of(c) for c in await group.claim(1, "audit")] == [5]
    assert await group.end(claim, Outcome.FAILED, error="after the commit") is Outcome.DONE
    assert await status(store, claim.job_id) == "done"


async def test_transact_leaves_the_claim_as_it_is(
    store: Store, group: Group, claim: Claim, port: Port
) -> None:
    assert isinstance(await store.commit_work(claim, enqueue_audit, None, port.committed), int)
    assert port.commits == 0
    assert await status(store, claim.job_id) == "running"
    assert len(await group.claim(1, "audit")) == 1
    assert await group.end(claim, Outcome.FAILED, error="later") is Outcome.FAILED


@pytest.mark.parametrize("completing", [True, False])
async def test_a_stale_claim_writes_nothing(
    store: Store, group: Group, claim: Claim, port: Port, completing: bool
) -> None:
    await group.end(claim, Outcome.RELEASED)
    with pytest.raises(StaleClaimError) as caught:
        await store.commit_work(claim, enqueue_audit, encode if completing else None, port.committed)
    assert caught.value.job_id == claim.job_id
    assert port.commits == 0
    assert await group.claim(1, "audit") == []
    assert await status(store, claim.job_id) == "pending"


async def test_an_error_of_the_work_undoes_everything(
    store: Store, group: Group, claim: Claim, port: Port
) -> None:
    def work(conn: Any) -> None:
        enqueue_audit(conn)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.commit_work(claim, work, encode, port.committed)
    assert port.commits == 0
    assert await group.claim(1, "audit") == []
    assert await status(store, claim.job_id) == "running"
    assert await group.end(claim, Outcome.DONE) is Outcome.DONE


async def test_a_value_that_is_no_result_undoes_everything(
    store: Store, group: Group, claim: Claim, port: Port
) -> None:
    def work(conn: Any) -> Any:
        enqueue_audit(conn)
        return object()

    with pytest.raises(triojobs.CodecError):
        await store.commit_work(claim, work, encode, port.committed)
    assert port.commits == 0
    assert await group.claim(1, "audit") == []


async def test_a_refused_enqueue_inside_undoes_itself_alone(
    store: Store, group: Group, claim: Claim, port: Port
) -> None:
    holder = await enqueue_one(store, queue="audit", key="k", number=1)

    def work(conn: Any) -> int:
        triojobs.enqueue_on(conn, AUDIT, 2)
        with pytest.raises(DuplicateJobError):
            triojobs.enqueue_many_on(conn, AUDIT, [3, triojobs.NewJob(4, key="k")])
        return triojobs.try_enqueue_on(conn, AUDIT, 5, key="k", on_conflict="return").id

    assert await store.commit_work(claim, work, encode, port.committed) == holder.id
    assert sorted(number_of(c) for c in await group.claim(9, "audit")) == [1, 2]


async def test_a_commit_wins_over_a_cancel_that_somebody_asked_for(
    store: Store, group: Group, claim: Claim, port: Port
) -> None:
    await store.cancel_job(claim.job_id, "too late")
    await store.commit_work(claim, lambda conn: 1, encode, port.committed)
    assert await status(store, claim.job_id) == "done"


async def test_a_claim_is_committed_once(store: Store, claim: Claim, port: Port) -> None:
    await store.commit_work(claim, lambda conn: 1, encode, port.committed)
    with pytest.raises(StaleClaimError):
        await store.commit_work(claim, lambda conn: 2, encode, port.committed)
    assert port.commits == 1
    assert (await read(store, claim.job_id)).result == encode(1)[0]
