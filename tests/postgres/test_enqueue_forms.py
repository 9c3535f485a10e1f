"""Every form of enqueue writes the same rows and treats keys and job ids alike."""

from __future__ import annotations

import datetime as dt

import pytest
from forms import FORMS, Form, SendEmail, by_client, by_outbox, emails, named, other, plain

import triojobs
from tests.tools.looking import places, rows, value


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_stores_all_that_it_was_given(conninfo: str, form: Form) -> None:
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    job_id = await form(
        conninfo,
        emails,
        SendEmail("ada@example.com"),
        run_at=soon,
        priority=5,
        max_attempts=9,
        timeout=2.5,
        deadline=soon + dt.timedelta(hours=1),
        key="welcome:42",
        metadata={"tenant": "ü", "n": [1, None]},
    )
    async with triojobs.open_client(conninfo) as client:
        info = await client.get(job_id, emails)
    assert info is not None
    assert info.payload == SendEmail("ada@example.com")
    assert (info.id, info.queue, info.status, info.attempts) == (job_id, "emails", "pending", 0)
    assert (info.run_at, info.deadline) == (soon, soon + dt.timedelta(hours=1))
    assert (info.priority, info.max_attempts, info.key) == (5, 9, "welcome:42")
    assert info.metadata == {"tenant": "ü", "n": [1, None]}
    assert (info.result, info.error, info.finished_at, info.group) == (None, None, None, None)
    assert rows(conninfo, "SELECT timeout FROM triojobs.jobs") == [(2.5,)]
    assert places(conninfo) == {"jobs": 1, "scheduled": 1, "keys": 1}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_has_the_documented_defaults(conninfo: str, form: Form) -> None:
    await form(conninfo, plain, {"x": 1})
    assert rows(
        conninfo,
        "SELECT priority, max_attempts, timeout, deadline, key, metadata, run_at <= enqueued_at FROM triojobs.jobs",
    ) == [(0, 5, None, None, None, {}, True)]
    assert places(conninfo) == {"jobs": 1, "ready": 1}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_counts_a_delay_by_the_servers_clock(conninfo: str, form: Form) -> None:
    await form(conninfo, plain, None, delay=60)
    assert value(
        conninfo,
        "SELECT run_at - enqueued_at BETWEEN interval '59 s' AND interval '60.1 s' FROM triojobs.jobs",
    )
    assert places(conninfo) == {"jobs": 1, "scheduled": 1}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_stores_until_when_the_key_holds(conninfo: str, form: Form) -> None:
    for key, key_until in (("a", "kept"), ("b", "ended"), ("c", 90.0), ("", 0)):
        await form(conninfo, plain, None, key=key, key_until=key_until)
    found = rows(conninfo, "SELECT key, hold, extract(epoch FROM until - now())::float8 FROM triojobs.keys")
    held = {key: (hold, until) for key, hold, until in found}
    assert held["a"] == ("kept", None)
    assert held["b"] == ("ended", None)
    assert held["c"] == ("until", pytest.approx(90.0, abs=10.0))
    assert held[""] == ("until", pytest.approx(0.0, abs=10.0))


async def test_each_form_repeats_a_job_id_without_effect(conninfo: str) -> None:
    async with triojobs.open_client(conninfo) as client:
        job_id = await client.new_job_id()
    for form in FORMS:
        assert await form(conninfo, plain, named(form), job_id=job_id) == job_id
    assert places(conninfo) == {"jobs": 1, "ready": 1}
    async with triojobs.open_client(conninfo) as client:
        info = await client.get(job_id)
    assert info is not None
    assert info.payload == "by_client"


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_refuses_a_job_id_that_was_not_handed_out(conninfo: str, form: Form) -> None:
    with pytest.raises(triojobs.OptionError) as caught:
        await form(conninfo, plain, None, job_id=10**9)
    assert (caught.value.field, caught.value.value) == ("job_id", 10**9)
    assert "new_job_id" in caught.value.limit
    assert places(conninfo) == {}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_names_the_holder_of_a_taken_key(conninfo: str, form: Form) -> None:
    first = await by_client(conninfo, plain, 1, key="k")
    with pytest.raises(triojobs.DuplicateJobError) as caught:
        await form(conninfo, plain, 2, key="k", on_conflict="raise")
    assert (caught.value.queue, caught.value.key, caught.value.job_id) == ("plain", "k", first)
    assert caught.value.index == (0 if "many" in named(form) or "stream" in named(form) else None)
    assert str(first) in str(caught.value)
    assert places(conninfo) == {"jobs": 1, "ready": 1, "keys": 1}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_returns_the_holder_of_a_taken_key(conninfo: str, form: Form) -> None:
    first = await by_client(conninfo, plain, 1, key="k")
    assert await form(conninfo, plain, 2, key="k", on_conflict="return") == first
    async with triojobs.open_client(conninfo) as client:
        info = await client.get(first)
    assert info is not None
    assert info.payload == 1
    assert places(conninfo) == {"jobs": 1, "ready": 1, "keys": 1}


@pytest.mark.parametrize("form", FORMS, ids=named)
async def test_each_form_replaces_the_body_of_a_job_that_has_not_started(conninfo: str, form: Form) -> None:
    first = await by_client(conninfo, plain, 1, key="k")
    await form(conninfo, plain, {"new": True}, key="k", on_conflict="replace", priority=7, delay=3600.0)
    async with triojobs.open_client(conninfo) as client:
        info = await client.get(first)
    assert info is not None
    assert (info.payload, info.priority) == ({"new": True}, 7)
    assert places(conninfo) == {"jobs": 1, "scheduled": 1, "keys": 1}


async def test_a_key_is_taken_in_its_queue_alone_and_the_empty_one_is_a_key(conninfo: str) -> None:
    await by_client(conninfo, plain, None)
    await by_client(conninfo, plain, None)
    for queue in (plain, other):
        for key in ("k", "K", ""):
            await by_outbox(conninfo, queue, None, key=key)
            with pytest.raises(triojobs.DuplicateJobError):
                await by_client(conninfo, queue, None, key=key)
    assert places(conninfo) == {"jobs": 8, "ready": 8, "keys": 6}
