"""Which programs the embedded server takes, and as whom they run."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from triojobs import _embedded_programs
from triojobs._embedded_programs import Account, find_bindir, newest_first, server_account, version_of
from triojobs.embedded import open_embedded_postgres

from .conftest import names_in, value

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root only")

# The interpreter itself may lie where an ordinary user cannot go (root's home), so the script imports
# everything first and becomes an ordinary user then.
ORDINARY = """
import os, pwd, sys
import psycopg, trio
from triojobs.embedded import open_embedded_postgres

async def main():
    async with open_embedded_postgres(sys.argv[1], bindir=sys.argv[2]) as conninfo:
        with psycopg.connect(conninfo) as conn:
            print(conn.execute("SHOW data_directory").fetchone()[0])
        print(os.stat(sys.argv[1] + "/pgdata").st_uid)

nobody = pwd.getpwnam("nobody")
os.setgroups([])
os.setgid(nobody.pw_gid)
os.setuid(nobody.pw_uid)
trio.run(main)
"""


def fake(bindir: Path) -> Path:
    """Make a directory with two programs."""
    bindir.mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (bindir / name).write_text("#!/bin/sh\nexit 1\n")
        (bindir / name).chmod(0o755)
    return bindir


def test_programs_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argument, variable, on_path, told = (fake(tmp_path / name) for name in ("arg", "var", "path", "told"))
    for version in ("9", "15", "17"):
        fake(tmp_path / "wheel" / f"pginstall{version}" / "bin")
        fake(tmp_path / "debian" / version / "bin")
    (tmp_path / "wheel" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    config = tmp_path / "config"
    config.mkdir()
    (config / "pg_config").write_text(f"#!/bin/sh\necho {told}\n")
    (config / "pg_config").chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_embedded_programs, "WHEEL", "wheel")
    monkeypatch.setattr(_embedded_programs, "DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("PATH", f"{on_path}:{config}")
    monkeypatch.setenv("TRIOJOBS_PG_BINDIR", str(variable))

    assert find_bindir(argument) == argument
    assert find_bindir() == variable
    monkeypatch.delenv("TRIOJOBS_PG_BINDIR")
    assert find_bindir() == tmp_path / "wheel" / "pginstall17" / "bin"
    monkeypatch.setattr(_embedded_programs, "WHEEL", "no_such_package")
    assert find_bindir() == on_path
    monkeypatch.setenv("PATH", str(config))
    assert find_bindir() == told
    monkeypatch.setenv("PATH", "")
    assert find_bindir() == tmp_path / "debian" / "17" / "bin"


async def test_debians_programs_do_as_well(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = newest_first(_embedded_programs.DEBIAN.glob("*/bin"))
    if not found:
        pytest.skip("Debian's PostgreSQL is not installed")
    monkeypatch.setenv("TRIOJOBS_PG_BINDIR", str(found[0]))

    async with open_embedded_postgres() as conninfo:
        assert "Debian" in str(value(conninfo, "SELECT version()"))

    assert names_in(place) == []


@pytest.fixture
def closed_bindir(place: Path) -> Path:
    """The wheel's programs in a project below a directory that only root can enter."""
    bindir = find_bindir()
    package = bindir.parent.parent
    if package.name != _embedded_programs.WHEEL:
        pytest.skip("the wheel is not installed")
    site = place / "home" / "site-packages"
    site.mkdir(parents=True)
    (place / "home").chmod(0o700)
    shutil.copytree(bindir.parent, site / package.name / bindir.parent.name)
    libraries = package.with_name(package.name + ".libs")
    shutil.copytree(libraries, site / libraries.name)
    return site / package.name / bindir.parent.name / "bin"


@as_root
async def test_root_with_programs_below_a_closed_directory(
    place: Path, closed_bindir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = server_account(place / "nothing")
    assert version_of(closed_bindir, account) is None  # the trap: it cannot be run from there

    async with open_embedded_postgres(place / "data", bindir=closed_bindir) as conninfo:
        assert value(conninfo, "SELECT 1") == 1

    assert stat.S_IMODE((place / "home").stat().st_mode) == 0o700
    assert (place / "data" / "pgdata").stat().st_uid == account.uid
    (copy,) = (place / "data").glob("postgres-*")
    assert copy.stat().st_uid == 0  # the server cannot change its own programs
    monkeypatch.setattr(shutil, "copytree", lambda *args, **kwargs: pytest.fail("copied again"))
    async with open_embedded_postgres(place / "data", bindir=closed_bindir) as conninfo:
        assert value(conninfo, "SELECT 1") == 1


@as_root
async def test_a_cluster_keeps_its_account(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_embedded_programs, "ROOT_ACCOUNTS", ("nobody",))
    async with open_embedded_postgres(place / "data"):
        pass
    monkeypatch.undo()

    async with open_embedded_postgres(place / "data") as conninfo:
        assert value(conninfo, "SELECT 1") == 1

    assert (place / "data" / "pgdata").stat().st_uid == pwd.getpwnam("nobody").pw_uid


@as_root
def test_an_ordinary_user_just_runs_it(place: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    bindir = find_bindir()
    if version_of(bindir, Account("nobody", nobody.pw_uid, nobody.pw_gid, switched=True)) is None:
        pytest.skip("nobody cannot enter the project")
    home = place / "home"
    home.mkdir()
    os.chown(home, nobody.pw_uid, nobody.pw_gid)

    done = subprocess.run(
        [sys.executable, "-c", ORDINARY, str(home / "data"), str(bindir)],
        env={**os.environ, "HOME": str(home), "TMPDIR": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout.split() == [f"{home}/data/pgdata", str(nobody.pw_uid)], done.stderr
    assert names_in(home) == ["data"]
    assert stat.S_IMODE((home / "data").stat().st_mode) == 0o700
