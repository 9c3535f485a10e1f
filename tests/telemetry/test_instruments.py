"""What instruments are told, and that one which fails hurts no job."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import trio

import triojobs
from triojobs import testing
from triojobs._instruments import Instrument, Sending, group_numbers, install
from triojobs._model import Enqueued, NewRow, Outcome
from triojobs._options import METADATA_LIMIT

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


class Noting(Instrument):
    """Writes down what it is told."""

    def __init__(self, **carried: str) -> None:
        self.notes: list[tuple[Any, ...]] = []
        self.carried = carried

    def before_enqueue(self, queue: str, jobs: int) -> str:
        self.notes.append(("enqueueing", queue, jobs))
        return "token"

    def metadata(self, token: str) -> dict[str, str]:
        assert token == "token"
        return self.carried

    def after_enqueue(
        self, token: Any, queue: str, entries: Sequence[Enqueued], error: BaseException | None
    ) -> None:
        assert token == "token"
        self.notes.append(("enqueued", [entry.created for entry in entries], type(error).__name__))

    def before_handler(self, job: Any, waited: float) -> int:
        self.notes.append(("starts", job.payload, round(waited, 3)))
        return int(job.id)

    def after_handler(
        self, token: Any, job: Any, seconds: float, outcome: str | None, error: BaseException | None
    ) -> None:
        assert token == job.id
        assert seconds >= 0
        self.notes.append(("ended", job.payload, outcome, type(error).__name__))

    def claimed(self, queue: str, jobs: int) -> None:
        self.notes.append(("claimed", queue, jobs))

    def ended(self, queue: str, outcome: Outcome, jobs: int) -> None:
        self.notes.append(("written", queue, str(outcome), jobs))

    def removed(self) -> None:
        self.notes.append(("removed",))


async def handler(job: triojobs.Job[Any]) -> Any:
    match job.payload:
        case "fails":
            raise ValueError("no")
        case "snoozes" if job.attempt == 1 and job.last_error is None and "again" not in job.metadata:
            raise triojobs.Kill("not now")
        case "commits":
            await job.commit(lambda transaction: "committed")
            raise ValueError("after the commit")
        case "commits and returns":
            return await job.commit(lambda transaction: "committed")
        case "cannot be encoded":
            return object()
        case "waits":
            await trio.sleep_forever()
    return job.payload


def fates(instrument: Noting, *words: str) -> list[tuple[Any, ...]]:
    return [note for note in instrument.notes if note[0] in words]


@pytest.mark.parametrize(
    ("payload", "outcome", "error"),
    [
        ("returns", "done", "NoneType"),
        ("fails", "killed", "ValueError"),
        ("snoozes", "killed", "Kill"),
        ("commits", "done", "ValueError"),
        ("commits and returns", "done", "NoneType"),
        ("cannot be encoded", "killed", "NoneType"),
    ],
)
async def test_a_handlers_run_and_its_outcome_are_told(
    autojump_clock: Any, payload: str, outcome: str, error: str
) -> None:
    database = testing.MemoryDatabase()
    with install(noting := Noting()):
        async with testing.open_memory_client(database) as client:
            await client.enqueue(plain, payload, max_attempts=1)
        await testing.drain(database, [triojobs.Worker(plain, handler)])
    order = ["enqueueing", "enqueued", "claimed", "starts", "ended", "written", "removed"]
    # A job that committed is written before its handler ends.
    notes = sorted(noting.notes, key=lambda note: order.index(note[0]))
    assert [note for note in notes if note[0] != "starts"] == [
        ("enqueueing", "plain", 1),
        ("enqueued", [True], "NoneType"),
        ("claimed", "plain", 1),
        ("ended", payload, outcome, error),
        ("written", "plain", outcome, 1),
        ("removed",),
    ]
    assert [note[0] for note in noting.notes][:4] == ["enqueueing", "enqueued", "claimed", "starts"]


async def test_a_job_that_is_given_back_is_told_as_released(autojump_clock: Any) -> None:
    database = testing.MemoryDatabase()
    with install(noting := Noting()):
        async with testing.open_memory_group(
            database, [triojobs.Worker(plain, handler)], grace_period=0.0
        ) as group:
            await group.client.enqueue(plain, "waits")
            while not group.statistics().running:
                await trio.sleep(0.1)
    assert fates(noting, "ended", "written") == [
        ("ended", "waits", "released", "Cancelled"),
        ("written", "plain", "released", 1),
    ]


async def test_the_wait_counts_from_the_due_time(autojump_clock: Any) -> None:
    database = testing.MemoryDatabase()
    with install(noting := Noting()):
        async with testing.open_memory_client(database) as client:
            await client.enqueue(plain, "at once")
            await client.enqueue(plain, "later", delay=100.0)
            await trio.sleep(130.0)
        await testing.drain(database, [triojobs.Worker(plain, handler)])
    waits = {payload: waited for _, payload, waited in fates(noting, "starts")}
    assert waits["at once"] == pytest.approx(130.0, abs=0.1)
    assert waits["later"] == pytest.approx(30.0, abs=0.1)


async def test_what_travels_is_added_to_the_callers_metadata_and_never_replaces_it() -> None:
    database = testing.MemoryDatabase()
    full = {"blob": "x" * (METADATA_LIMIT - len('{"blob":""}'))}
    with install(Noting(trace="7", tenant="ours")):
        async with testing.open_memory_client(database) as client:
            ids = await client.enqueue_many(
                plain,
                [
                    1,
                    triojobs.NewJob(2, metadata={"tenant": "theirs", "n": [1, "ä"]}),
                    triojobs.NewJob(3, metadata=full),
                ],
            )
            found = [await client.get(job_id) for job_id in ids]
    assert [dict(job.metadata) for job in found if job is not None] == [
        {"trace": "7", "tenant": "ours"},
        {"trace": "7", "tenant": "theirs", "n": [1, "ä"]},
        full,
    ]


async def test_an_enqueue_that_fails_is_told_with_its_error() -> None:
    database = testing.MemoryDatabase()
    with install(noting := Noting()):
        async with testing.open_memory_client(database) as client:
            await client.enqueue(plain, 1, key="k")
            with pytest.raises(triojobs.DuplicateJobError):
                await client.enqueue(plain, 2, key="k")
            await client.try_enqueue(plain, 3, key="k")
            with pytest.raises(triojobs.OptionError):  # refused before anything is sent: nothing to tell
                await client.enqueue(plain, 4, priority=-1)
            assert await client.enqueue_many(plain, []) == []
    assert fates(noting, "enqueueing", "enqueued") == [
        ("enqueueing", "plain", 1),
        ("enqueued", [True], "NoneType"),
        ("enqueueing", "plain", 1),
        ("enqueued", [], "DuplicateJobError"),
        ("enqueueing", "plain", 1),
        ("enqueued", [False], "NoneType"),
    ]


class Broken(Instrument):
    """Raises wherever it can."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or name == "removed":
            return found

        def broken(*args: Any) -> Any:
            raise RuntimeError(f"{name} is broken")

        broken.__name__ = name
        broken.__self__ = self  # type: ignore[attr-defined]
        return broken


async def test_one_that_fails_hurts_no_job_nor_the_others_and_is_logged_once(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    database = testing.MemoryDatabase()
    with caplog.at_level(logging.ERROR, "triojobs"), install(Broken()), install(noting := Noting(a="b")):
        async with testing.open_memory_client(database) as client:
            ids = await client.enqueue_many(plain, ["one", "two", "three"])
            await testing.drain(database, [triojobs.Worker(plain, handler)])
            found = [await client.get(job_id) for job_id in ids]
    assert [(job.status, job.metadata) for job in found if job is not None] == [("done", {"a": "b"})] * 3
    assert len(fates(noting, "ended")) == 3
    failed = [r for r in caplog.records if getattr(r, "event", None) == "instrument_failed"]
    assert sorted(r.method for r in failed) == sorted(  # type: ignore[attr-defined]
        ["before_enqueue", "metadata", "after_enqueue", "claimed", "before_handler", "after_handler", "ended"]
    )


def test_without_an_instrument_rows_are_sent_as_they_are() -> None:
    rows = [NewRow("plain", b"", "cbor")]
    with Sending(rows) as sent:
        assert sent.rows is rows


def test_metadata_for_many_rows_keeps_their_order_and_the_rest_of_them() -> None:
    rows = [NewRow("plain", bytes([n]), "cbor", key=str(n), metadata=json.dumps({"n": n})) for n in range(3)]
    with install(Noting(t="1")), Sending(rows) as sent:
        pass
    assert [row._replace(metadata="") for row in sent.rows] == [row._replace(metadata="") for row in rows]
    assert [json.loads(row.metadata) for row in sent.rows] == [{"t": "1", "n": n} for n in range(3)]


async def test_the_sums_over_groups_keep_what_closed_groups_did() -> None:
    database = testing.MemoryDatabase()
    before, groups = group_numbers()
    assert groups == []
    async with testing.open_memory_group(database, [triojobs.Worker(plain, handler)], name="a"):
        async with testing.open_memory_group(database, [triojobs.Worker(plain, handler)], name="b") as other:
            channel = other.events(buffer=1)
            await other.client.result(await other.client.enqueue(plain, "returns"))
            assert [name for name, _ in group_numbers()[1]] == ["a", "b"]
        channel.close()
        dropped = group_numbers()[0].events_dropped
        assert [name for name, _ in group_numbers()[1]] == ["a"]
    assert dropped > before.events_dropped
    assert group_numbers() == (group_numbers()[0], [])
    assert group_numbers()[0].events_dropped == dropped
