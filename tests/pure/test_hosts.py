"""Whom a conninfo with several hosts makes us ask, in which order, and for how long."""

from __future__ import annotations

import socket
from typing import Any

import psycopg
import pytest

from triojobs._sql.hosts import LEAST, Hosts, addresses, share


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGHOSTADDR", "PGPORT"):
        monkeypatch.delenv(name, raising=False)


def asked(hosts: Hosts) -> list[dict[str, str]]:
    return [where for _, where in hosts.order()]


@pytest.mark.parametrize(
    ("conninfo", "where"),
    [
        ("", {}),
        ("dbname=x", {}),
        ("host=a port=1", {"host": "a", "port": "1"}),
        ("hostaddr=::1", {"hostaddr": "::1"}),
        ("no conninfo at all", {}),
    ],
)
def test_a_single_host_is_asked_as_it_is_given(conninfo: str, where: dict[str, str]) -> None:
    assert asked(Hosts(conninfo)) == [where]


def test_each_of_several_hosts_has_its_port_and_its_address() -> None:
    assert asked(Hosts("host=a,b hostaddr=10.0.0.1,10.0.0.2 port=1,2")) == [
        {"host": "a", "hostaddr": "10.0.0.1", "port": "1"},
        {"host": "b", "hostaddr": "10.0.0.2", "port": "2"},
    ]
    assert [where["port"] for where in asked(Hosts("host=a,b port=7"))] == ["7", "7"]


def test_hosts_of_the_environment_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "a,b")
    monkeypatch.setenv("PGPORT", "1,2")
    assert asked(Hosts("dbname=x")) == [{"host": "a", "port": "1"}, {"host": "b", "port": "2"}]
    assert [where["host"] for where in asked(Hosts("host=c port=3"))] == ["c"]


def test_who_answered_is_asked_first_and_who_did_not_in_time_last() -> None:
    hosts = Hosts("host=a,b,c")

    def order() -> str:
        return "".join(where["host"] for where in asked(hosts))

    assert order() == "abc"
    hosts.answered(1)
    assert order() == "bca"
    hosts.timed_out(1)
    assert order() == "cab"
    hosts.timed_out(0)  # it was not the first: another call has moved on already
    assert order() == "cab"
    hosts.timed_out(2)
    assert order() == "abc"


@pytest.mark.parametrize("left", [0.0, 0.5, 2.0, 3.9, 4.0, 7.0, 60.0])
@pytest.mark.parametrize("count", range(1, 9))
def test_silent_hosts_share_what_is_left_and_none_gets_a_useless_bit(left: float, count: int) -> None:
    total, given = left, []
    for takers in range(count, 0, -1):
        given.append(share(left, takers))
        left -= given[-1]
    assert sum(given) == pytest.approx(total)
    assert all(seconds >= min(total, LEAST) - 1e-9 for seconds in given[: max(1, int(total / LEAST))])


def test_a_name_is_asked_at_each_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (family, socket.SOCK_STREAM, 6, "", (address, 0))
        for family, address in ((socket.AF_INET6, "::1"), (socket.AF_INET, "10.0.0.1"))
        for _ in range(2)
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    assert addresses({"host": "db", "port": "1"}) == [
        {"host": "db", "port": "1", "hostaddr": "::1"},
        {"host": "db", "port": "1", "hostaddr": "10.0.0.1"},
    ]


@pytest.mark.parametrize(
    "where",
    [{}, {"host": ""}, {"host": "/run"}, {"host": "@abstract"}, {"host": "a", "hostaddr": "10.0.0.1"}],
)
def test_what_needs_no_resolver_does_not_ask_it(
    monkeypatch: pytest.MonkeyPatch, where: dict[str, str]
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert addresses(where) == [where]


def test_a_name_that_nobody_knows_is_an_error_of_connecting() -> None:
    with pytest.raises(psycopg.OperationalError, match=r'host name "no\.invalid"'):
        addresses({"host": "no.invalid"})
    with pytest.raises(psycopg.OperationalError, match="could not translate"):
        addresses({"host": "." * 100})
