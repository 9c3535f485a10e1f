"""Whom a conninfo with several hosts makes us ask, in which order, and for how long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from triojobs._sql.hosts import Hosts


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGHOSTADDR", "PGPORT", "PGTARGETSESSIONATTRS"):
        monkeypatch.delenv(name, raising=False)


def connection(host: str, port: int, hostaddr: str = "") -> Any:
    return SimpleNamespace(info=SimpleNamespace(host=host, port=port, hostaddr=hostaddr))


@pytest.mark.parametrize("conninfo", ["", "host=a port=1", "dbname=x", "hostaddr=::1", "no conninfo at all"])
def test_a_single_host_gets_all_the_time_and_is_left_to_libpq(conninfo: str) -> None:
    hosts = Hosts(conninfo)
    assert hosts.choose(5.9) == ({}, {"connect_timeout": 5})
    assert hosts.choose(0.3) == ({}, {"connect_timeout": 2})  # libpq's least
    assert hosts.choose(-1.0) == ({}, {"connect_timeout": 2})


def test_the_time_is_divided_among_the_hosts_and_the_primary_is_wanted() -> None:
    overrides, defaults = Hosts("host=a,b port=1,2").choose(10.0)
    assert overrides == {"host": "a,b", "port": "1,2"}
    assert defaults == {"connect_timeout": 5, "target_session_attrs": "read-write"}


def test_when_the_time_is_too_short_for_all_the_others_are_next() -> None:
    hosts = Hosts("host=a,b,c port=1,2,3")
    asked = [hosts.choose(4.0) for _ in range(3)]
    assert [overrides["host"] for overrides, _ in asked] == ["a,b", "c,a", "b,c"]
    assert [overrides["port"] for overrides, _ in asked] == ["1,2", "3,1", "2,3"]
    assert [defaults["connect_timeout"] for _, defaults in asked] == [2, 2, 2]
    assert hosts.choose(0.0)[0]["host"] == "a"  # one is always asked


@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.9, 4.0, 7.0, 60.0])
def test_a_try_is_bounded_whatever_the_number_of_hosts(seconds: float) -> None:
    for count in range(1, 9):
        overrides, defaults = Hosts("host=" + ",".join("abcdefgh"[:count])).choose(seconds)
        asked = len(overrides.get("host", "a").split(","))
        assert asked * defaults["connect_timeout"] <= max(seconds, 2.0)


@pytest.mark.parametrize(
    ("conninfo", "answered"),
    [
        ("host=a,b,c port=1,2,3", connection("b", 2)),
        ("host=a,b,c", connection("b", 5432, "10.0.0.2")),
        ("hostaddr=10.0.0.1,10.0.0.2,10.0.0.3", connection("", 5432, "10.0.0.2")),
        ("host=same,same,same port=1,2,3", connection("same", 2)),
        ("host=a,b,c port=7", connection("b", 7)),
        ("host=/run/a,/run/b,/run/c", connection("/run/b", 5432)),
    ],
)
def test_who_answered_is_asked_first(conninfo: str, answered: Any) -> None:
    hosts = Hosts(conninfo)
    hosts.answered(answered)
    first, _ = hosts.choose(2.0)
    only_it = {
        "host": answered.info.host,
        "hostaddr": answered.info.hostaddr,
        "port": str(answered.info.port),
    }
    assert first
    assert first.items() <= only_it.items()


def test_names_and_addresses_stay_together() -> None:
    hosts = Hosts("host=a,b hostaddr=10.0.0.1,10.0.0.2 port=7")
    assert hosts.choose(2.0)[0] == {"host": "a", "hostaddr": "10.0.0.1", "port": "7"}
    assert hosts.choose(2.0)[0] == {"host": "b", "hostaddr": "10.0.0.2", "port": "7"}


def test_hosts_of_the_environment_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "a,b")
    monkeypatch.setenv("PGPORT", "1,2")
    assert Hosts("dbname=x").choose(4.0)[0] == {"host": "a,b", "port": "1,2"}
    assert Hosts("host=c port=3").choose(4.0)[0] == {}


def test_whoever_asked_for_other_sessions_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "any")
    assert "target_session_attrs" not in Hosts("host=a,b").choose(4.0)[1]
