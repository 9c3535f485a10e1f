"""What `--health` serves beside a worker: /livez, /readyz and, where prometheus-client is installed, /metrics."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import click

from .ending import Failure
from .output import note

if TYPE_CHECKING:
    from .. import WorkerGroup
    from .._health import ASGIApp

    AddressType = click.ParamType[tuple[str, int]]
else:
    AddressType = click.ParamType  # generic in new versions of click only

__all__ = ["ADDRESS", "Health"]


class Address(AddressType):
    """HOST:PORT; an IPv6 address stands in brackets."""

    name = "address"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        host, _, port = str(value).rpartition(":")
        if not (host and port.isascii() and port.isdigit() and int(port) < 65536):
            self.fail(f"{value!r} is not HOST:PORT such as 0.0.0.0:8086", param, ctx)
        return host.removeprefix("[").removesuffix("]"), int(port)


ADDRESS: Final = Address()


class Health:
    """A listening socket, for the group that will be opened: what cannot listen is told before anything runs.

    Use it in a `with` block: the group may never open.

    Raises:
        Failure: the HTTP server is not installed, or the address cannot be listened on.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        if find_spec("hypercorn") is None:
            raise Failure('--health needs an HTTP server: pip install "triojobs[health]"')
        host, port = address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as exc:
            why = str(exc.strerror or exc).partition(" (")[0]
            raise Failure(f"cannot listen on {host}:{port}: {why}; give --health another address") from exc

    def __enter__(self) -> Health:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()  # unless it was given away

    @asynccontextmanager
    async def beside(self, group: WorkerGroup) -> AsyncIterator[None]:
        """Answer for this group while the block runs."""
        import trio
        from hypercorn.config import Config
        from hypercorn.trio import serve

        config = Config()
        config.errorlog = None
        config.graceful_timeout = 0.0
        host, port = self._socket.getsockname()[:2]
        config.bind = [f"fd://{self._socket.detach()}"]
        with _app(group) as app:
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(serve, app, config, shutdown_trigger=trio.sleep_forever))
                note(f"health on http://{f'[{host}]' if ':' in host else host}:{port}/readyz")
                yield
                nursery.cancel_scope.cancel()


@contextmanager
def _app(group: WorkerGroup) -> Iterator[Any]:
    """Make the app; with prometheus-client it measures from here on."""
    from .. import health_app

    health = health_app(group)
    if find_spec("prometheus_client") is None:
        yield health
        return
    from prometheus_client import CollectorRegistry, make_asgi_app

    from ..prometheus import instrument

    registry = CollectorRegistry()
    metrics: ASGIApp = make_asgi_app(registry)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        wanted = scope["type"] == "http" and scope["path"] == "/metrics"
        await (metrics if wanted else health)(scope, receive, send)

    with instrument(registry):
        yield app
