"""/livez and /readyz as an orchestrator asks for them, over a real server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.routing import Mount

import triojobs
from tests.tools.looking import until
from triojobs import testing

plain: triojobs.Queue[Any, Any] = triojobs.Queue("plain")


async def handler(job: triojobs.Job[Any]) -> None:
    pass


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """Serve an app with Hypercorn; yield host:port."""
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(partial(serve, app, config))
        yield address.removeprefix("http://")
        nursery.cancel_scope.cancel()


async def ask(address: str, request: str) -> tuple[int, dict[str, Any]]:
    """Send one request; return the status and the JSON that came back."""
    host, port = address.rsplit(":", 1)
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(f"{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        data = b"".join([chunk async for chunk in stream])
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body else {}


async def test_a_group_that_runs_is_alive_and_ready(conninfo: str) -> None:
    async with (
        triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)], name="g") as group,
        served(triojobs.health_app(group)) as address,
    ):
        for path in ("/livez", "/readyz", "/readyz/"):
            status, body = await ask(address, f"GET {path}")
            assert (status, body["status"]) == (200, "ok")
            age = body["groups"]["g"].pop("lease_age")
            assert 0 <= age < 25
            assert body["groups"] == {"g": {"state": "running", "running": 0, "free": 10}}
        assert await ask(address, "HEAD /livez") == (200, {})
        assert (await ask(address, "POST /livez"))[0] == 405
        assert (await ask(address, "GET /other"))[0] == 404


async def test_while_it_stops_it_is_alive_and_not_ready_and_afterwards_neither(conninfo: str) -> None:
    release = trio.Event()

    async def holding(job: triojobs.Job[Any]) -> None:
        await release.wait()

    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, holding)], name="g") as group:
        await group.client.enqueue(plain, None)
        async with served(triojobs.health_app(group)) as address:
            with trio.fail_after(15):
                while not group.statistics().running:
                    await trio.sleep(0.01)
            group.stop()
            assert (await ask(address, "GET /livez"))[0] == 200
            status, body = await ask(address, "GET /readyz")
            assert (status, body["status"], body["groups"]["g"]["state"]) == (503, "unavailable", "stopping")
            release.set()
            with trio.fail_after(15):
                await group.wait_stopped()
            for path in ("/livez", "/readyz"):
                status, body = await ask(address, f"GET {path}")
                assert (status, body["groups"]["g"]["state"]) == (503, "stopped")
                assert body["groups"]["g"]["lease_age"] is None


async def test_without_a_lease_it_is_alive_and_not_ready(autojump_clock: Any) -> None:
    """The state is decided by the lease; a group in memory whose database is away loses it."""
    database = testing.MemoryDatabase()
    async with testing.open_memory_group(database, [triojobs.Worker(plain, handler)], name="g") as group:
        assert group.state == "running"
        live = group._registrations[-1]
        live.lease.lose()
        assert group.state == "without lease"
        live.lease.confirm(trio.current_time())
        assert group.state == "running"
    assert group.state == "stopped"


async def test_one_of_several_groups_that_is_not_ready_is_enough(conninfo: str) -> None:
    workers = [triojobs.Worker(plain, handler)]
    async with (
        triojobs.open_worker_group(conninfo, workers, name="a") as a,
        triojobs.open_worker_group(conninfo, workers, name="b") as b,
        served(triojobs.health_app(a, b)) as address,
    ):
        b.stop()
        status, body = await ask(address, "GET /readyz")
        assert status == 503
        assert sorted(body["groups"]) == ["a", "b"]
        assert body["groups"]["a"]["state"] == "running"


async def test_it_can_be_mounted_beside_other_routes(conninfo: str) -> None:
    async with triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group:
        program = Starlette(routes=[Mount("/health", triojobs.health_app(group))])
        async with served(program) as address:
            assert (await ask(address, "GET /health/readyz"))[0] == 200
            assert (await ask(address, "GET /health/nothing"))[0] == 404


@pytest.mark.parametrize("groups", [(), ("g",)])
def test_it_is_refused_without_groups(groups: tuple[Any, ...]) -> None:
    with pytest.raises(triojobs.OptionError, match="groups"):
        triojobs.health_app(*groups)


async def test_a_database_that_is_away_makes_nobody_restart_the_program(conninfo: str) -> None:
    """Its sessions are terminated; until the lease has ended the group is ready, and it is alive all the time."""
    async with (
        triojobs.open_worker_group(conninfo, [triojobs.Worker(plain, handler)]) as group,
        served(triojobs.health_app(group)) as address,
    ):
        await until(
            conninfo,
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name LIKE 'triojobs%' AND datname = current_database()",
        )
        assert (await ask(address, "GET /livez"))[0] == 200
        assert (await ask(address, "GET /readyz"))[0] == 200
