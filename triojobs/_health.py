"""Health of worker groups for whoever orchestrates: /livez and /readyz as an ASGI app, and sd_notify."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

import trio

from ._client import on_loop, wrong_side
from ._errors import OptionError
from ._group import WorkerGroup
from ._systemd import Manager

__all__ = ["health_app", "notify_systemd"]

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OK: Final = 200
NOT_FOUND: Final = 404
NOT_ALLOWED: Final = 405
UNAVAILABLE: Final = 503


def health_app(*groups: WorkerGroup) -> ASGIApp:
    """Return an ASGI app that answers for these groups, for a server in the same Trio program.

    * ``/livez``: 200 while the event loop answers and no group has stopped; 503 afterwards: a program
      whose group is gone does nothing more, and wants to be started again. A database that is
      away does not count: no restart brings it back.
    * ``/readyz``: 200 while every group has its lease and takes jobs; 503 while one stops or has no lease that it
      can prove, with the reason.

    The body is JSON: ``{"status": "ok", "groups": {"web-1": {"state": "running", …}}}``. Mount it beside your own
    routes, or serve it alone: ``await hypercorn.trio.serve(health_app(group), config)``.

    Raises:
        OptionError: there is no group, or something else than groups.
    """
    if not groups or not all(isinstance(group, WorkerGroup) for group in groups):
        raise OptionError("groups", groups, "at least one triojobs.WorkerGroup")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await _answer(scope, send, groups)
        else:
            raise NotImplementedError(f"triojobs.health_app does not speak {scope['type']}")

    return app


async def notify_systemd(
    group: WorkerGroup, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Tell the service manager about a group, until it has stopped: `nursery.start_soon(notify_systemd, group)`.

    READY=1 at once, WATCHDOG=1 from the event loop twice as often as ``WatchdogSec=`` wants it (a
    blocked loop is silent, and is restarted), STOPPING=1 when the group begins to stop. Without
    ``NOTIFY_SOCKET`` in the environment it does nothing. `serve`, and with it ``triojobs worker``, has it built in.

    Cancellation: at any time.
    """
    if not on_loop():
        raise wrong_side("notify_systemd", "start it in a nursery")
    manager = Manager()
    manager.tell(READY="1", STATUS=f"worker group {group.name}")
    task_status.started()
    if not manager.listens:
        await trio.lowlevel.checkpoint()
        return
    async with trio.open_nursery() as nursery:
        if manager.watchdog_interval is not None:
            nursery.start_soon(_show_signs_of_life, manager, manager.watchdog_interval)
        try:
            await group._wait_stop_asked()
        finally:
            manager.tell(STOPPING="1", STATUS=f"worker group {group.name} stops")
        await group.wait_stopped()  # a graceful stop may take longer than the watchdog's patience
        nursery.cancel_scope.cancel()


async def _show_signs_of_life(manager: Manager, interval: float) -> None:
    while True:
        manager.tell(WATCHDOG="1")
        await trio.sleep(interval)


# The app.


async def _live(receive: Receive, send: Send) -> None:
    """Answer the server's lifespan protocol; there is nothing to start."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _answer(scope: Scope, send: Send, groups: tuple[WorkerGroup, ...]) -> None:
    path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
    states = [(group, group.state) for group in groups]
    if path == "/livez":
        good = all(state != "stopped" for _, state in states)
    elif path == "/readyz":
        good = all(state == "running" for _, state in states)
    else:
        await _send(send, NOT_FOUND, {"status": "not found", "paths": ["/livez", "/readyz"]})
        return
    if scope["method"] not in ("GET", "HEAD"):
        await _send(send, NOT_ALLOWED, {"status": "method not allowed"})
        return
    body = {
        "status": "ok" if good else "unavailable",
        "groups": {group.name: _numbers(group, state) for group, state in states},
    }
    await _send(send, OK if good else UNAVAILABLE, body, head=scope["method"] == "HEAD")


def _numbers(group: WorkerGroup, state: str) -> dict[str, Any]:
    numbers = group.statistics()
    age = None if numbers.lease_age == float("inf") else round(numbers.lease_age, 3)
    return {"state": state, "running": numbers.running, "free": numbers.free, "lease_age": age}


async def _send(send: Send, status: int, body: dict[str, Any], *, head: bool = False) -> None:
    data = json.dumps(body).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else data})
