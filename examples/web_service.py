"""A web service with an outbox: an order and the e-mail about it are committed together, or neither is.

    python examples/web_service.py                                  # with an embedded PostgreSQL
    python examples/web_service.py postgresql://localhost/shop      # with your own
    curl -d '{"customer": "ada@example.com"}' http://localhost:8000/orders
    curl http://localhost:8000/orders/1

The service and its worker group share one Trio program. SIGTERM or Ctrl-C stops both: requests in flight are
answered, jobs in flight end or are given back.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypercorn.trio
import psycopg
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import triojobs

TABLES = """
CREATE TABLE IF NOT EXISTS orders
    (id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, customer text NOT NULL, confirmed_at timestamptz)
"""


@dataclass(frozen=True)
class Confirm:
    order: int


confirmations = triojobs.Queue("confirmations", Confirm)


async def confirm(job: triojobs.Job[Confirm]) -> None:
    await trio.sleep(0.1)  # talk to a mail server; it is told job.id, so that a repetition can be recognised

    def work(conn: psycopg.Connection[Any]) -> None:
        conn.execute("UPDATE orders SET confirmed_at = now() WHERE id = %s", [job.payload.order])

    await job.commit(work)  # the order says so if and only if the job is done


def place_order(conninfo: str, customer: str) -> int:
    """In a thread. A service of yours takes the connection from its pool."""
    with psycopg.connect(conninfo) as conn, conn.transaction():
        row = conn.execute("INSERT INTO orders (customer) VALUES (%s) RETURNING id", [customer]).fetchone()
        assert row is not None
        triojobs.enqueue_on(conn, confirmations, Confirm(row[0]))
    return int(row[0])


def look_up(conninfo: str, order: int) -> tuple[Any, ...] | None:
    with psycopg.connect(conninfo) as conn:
        return conn.execute("SELECT customer, confirmed_at FROM orders WHERE id = %s", [order]).fetchone()


def make_app(conninfo: str) -> Starlette:
    async def orders(request: Request) -> JSONResponse:
        customer = (await request.json())["customer"]
        order = await trio.to_thread.run_sync(place_order, conninfo, customer)
        return JSONResponse({"order": order}, status_code=201)

    async def order(request: Request) -> JSONResponse:
        number = request.path_params["number"]
        found = await trio.to_thread.run_sync(look_up, conninfo, number)
        if found is None:
            return JSONResponse({"error": f"there is no order {number}"}, status_code=404)
        return JSONResponse({"order": number, "customer": found[0], "confirmed": found[1] is not None})

    return Starlette(
        routes=[Route("/orders", orders, methods=["POST"]), Route("/orders/{number:int}", order)]
    )


async def main(conninfo: str, bind: str) -> None:
    triojobs.migrate(conninfo)
    with psycopg.connect(conninfo) as conn:
        conn.execute(TABLES)
    config = hypercorn.Config()
    config.bind = [bind]
    async with trio.open_nursery() as nursery:
        # `serve` obeys the signals; when its group has stopped, the web server stops too.
        group = await nursery.start(triojobs.serve, conninfo, [triojobs.Worker(confirmations, confirm)])
        await hypercorn.trio.serve(make_app(conninfo), config, shutdown_trigger=group.wait_stopped)


async def run(arguments: list[str]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        conninfo = (
            arguments[0] if arguments else await stack.enter_async_context(triojobs.open_embedded_postgres())
        )
        await main(conninfo, os.environ.get("BIND", "127.0.0.1:8000"))


if __name__ == "__main__":
    trio.run(partial(run, sys.argv[1:]))
