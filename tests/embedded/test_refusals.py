"""Every refusal of the embedded server is one line that says what to do."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from triojobs import _embedded_cluster, _embedded_directory, _embedded_programs
from triojobs._embedded_programs import Account, candidates, version_of
from triojobs._errors import DatabaseError, OptionError, TriojobsError
from triojobs.embedded import open_embedded_postgres

from .conftest import names_in, processes_below, value

DOING = "while opening the embedded PostgreSQL: "
OWN = Account("ourselves", os.geteuid(), os.getegid(), switched=False)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root only")


async def refusal(data_dir: str | Path | None, *, bindir: Path | None = None) -> TriojobsError:
    """Open, expect to be refused, and return the error after a look at its form."""
    with pytest.raises(TriojobsError) as caught:
        async with open_embedded_postgres(data_dir, bindir=bindir):
            pass
    assert str(caught.value).startswith(DOING)
    assert "\n" not in str(caught.value)
    return caught.value


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


async def test_no_programs_anywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_embedded_programs, "WHEEL", "there_is_no_such_package")
    monkeypatch.setattr(_embedded_programs, "DEBIAN", place)
    monkeypatch.setenv("PATH", str(place))

    error = await refusal(None)

    assert str(error) == (
        f"{DOING}PostgreSQL's programs initdb and postgres were not found; install triojobs[embedded], "
        "or set TRIOJOBS_PG_BINDIR to the directory that holds them"
    )
    assert names_in(place) == []


async def test_a_named_bindir_without_the_programs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = "must be a directory that holds initdb and postgres"
    assert str(await refusal(None, bindir=place)) == f"{DOING}bindir is '{place}', but {limit}"

    monkeypatch.setenv("TRIOJOBS_PG_BINDIR", "/nowhere")
    assert str(await refusal(None)) == f"{DOING}TRIOJOBS_PG_BINDIR is '/nowhere', but {limit}"


async def test_a_directory_that_cannot_be_made(place: Path) -> None:
    (place / "file").write_text("")

    error = await refusal(place / "file" / "data")

    assert isinstance(error, OptionError)
    assert error.field == "data_dir"
    assert "a directory that can be made and written (Not a directory)" in str(error)


async def test_a_file_in_place_of_the_directory(place: Path) -> None:
    (place / "file").write_text("")
    assert "(Not a directory)" in str(await refusal(place / "file"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_directory_that_cannot_be_written(place: Path) -> None:
    (place / "data").mkdir(mode=0o500)
    assert "(Permission denied)" in str(await refusal(place / "data"))


async def test_an_empty_path_is_not_the_current_directory() -> None:
    assert "data_dir is '', but must be a path, or None" in str(await refusal(""))


@pytest.mark.parametrize("name", ["notes.txt", "PG_VERSION", "pgdata"])
async def test_a_directory_of_somebody_else_is_left_alone(place: Path, name: str) -> None:
    (place / name).write_text("mine")

    error = await refusal(place)

    assert f"'{place}', but must be new, empty, or a directory that open_embedded_postgres made" in str(error)
    assert str(error).endswith(f"; name a directory inside it, such as {place / 'postgres'}")
    assert names_in(place) == [name]


async def test_a_cluster_of_another_major_version(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    versions = {version_of(bindir, OWN): bindir for bindir in candidates()}
    if len(versions) < 2:
        pytest.skip("one version of PostgreSQL is here")
    (old, old_bindir), *_, (new, new_bindir) = sorted(versions.items())
    async with open_embedded_postgres(place / "data", bindir=old_bindir):
        pass

    error = await refusal(place / "data", bindir=new_bindir)

    old_major = old.split(".")[0]
    assert isinstance(error, DatabaseError)
    assert f"was made by PostgreSQL {old_major}, but" in str(error)
    assert f" holds {new}; set TRIOJOBS_PG_BINDIR to the programs of PostgreSQL {old_major}" in str(error)
    async with open_embedded_postgres(place / "data", bindir=old_bindir) as conninfo:
        assert str(value(conninfo, "SHOW server_version")).startswith(old_major)


async def test_a_server_that_does_not_start_says_why(place: Path) -> None:
    async with open_embedded_postgres(place / "data"):
        pass
    with (place / "data" / "pgdata" / "postgresql.conf").open("a") as conf:
        conf.write("nonsense = 1\n")

    error = await refusal(place / "data")

    assert "the server ended with 1: " in str(error)
    assert 'unrecognized configuration parameter "nonsense"' in str(error)
    assert names_in(place) == ["data"]


async def test_a_server_that_is_not_up_in_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_embedded_postgres(place / "data"):
        pass
    monkeypatch.setattr(_embedded_cluster, "START_TIMEOUT", -1.0)

    assert "the server is not up after -1 s: " in str(await refusal(place / "data"))
    assert processes_below(place) == []


async def test_initdb_that_fails_says_why(place: Path) -> None:
    bindir = place / "bin"
    bindir.mkdir()
    script(bindir / "postgres", "echo 'postgres (PostgreSQL) 18.4'")
    script(bindir / "initdb", "echo 'initdb: error: no space' >&2; exit 3")

    error = await refusal(place / "data", bindir=bindir)

    assert "initdb ended with 3: initdb: error: no space; " in str(error)
    assert names_in(place / "data") == ["server.log"]


async def test_programs_that_do_not_run(place: Path) -> None:
    bindir = place / "bin"
    bindir.mkdir()
    script(bindir / "postgres", "echo 'cannot open shared object' >&2; exit 127")
    script(bindir / "initdb", "exit 127")

    assert f"the programs in {bindir} cannot be run as user" in str(await refusal(None, bindir=bindir))
    assert names_in(place) == ["bin"]


async def test_no_place_for_the_socket(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_embedded_directory, "SOCKET_PATH_LIMIT", 20)

    error = str(await refusal(None))

    assert "there is no place for the server's socket: " in error
    assert "/tmp makes 43 bytes of at most 20; set TMPDIR to a directory with a short path" in error
    assert names_in(place) == []


async def test_a_long_tmpdir_moves_only_the_socket(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = place / ("x" * 100)
    long.mkdir()
    long.chmod(0o711)
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    async with open_embedded_postgres() as conninfo:
        assert "host='/tmp/triojobs-socket-" in conninfo
        assert str(value(conninfo, "SHOW data_directory")).startswith(str(long))

    assert names_in(long) == []


async def test_a_left_server_that_does_not_answer(
    place: Path,
    owner: Callable[..., tuple[subprocess.Popen[str], str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, _ = owner(place / "data")
    process.kill()
    process.wait()
    with monkeypatch.context() as patch:
        patch.setattr(_embedded_cluster, "data_directory_at", lambda conninfo: None)
        patch.setattr(_embedded_cluster, "START_TIMEOUT", -1.0)

        error = str(await refusal(place / "data"))

    assert "does not answer; stop it with `kill -QUIT " in error
    async with open_embedded_postgres(place / "data"):  # adopts it, so that the test leaves nothing
        pass
    assert processes_below(place) == []


@as_root
async def test_a_cluster_that_belongs_to_root(place: Path) -> None:
    async with open_embedded_postgres(place / "data"):
        pass
    shutil.chown(place / "data" / "pgdata", 0, 0)

    assert f"; run `chown -R postgres {place / 'data' / 'pgdata'}`" in str(await refusal(place / "data"))


@as_root
async def test_root_below_a_closed_directory(place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)

    error = str(await refusal(closed / "data"))

    assert "Permission denied; as root the server runs as user " in error
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
