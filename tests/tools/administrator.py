"""What the administrator of an embedded server does to it from outside."""

from __future__ import annotations

import subprocess
from pathlib import Path

from triojobs._embedded_programs import find_bindir, server_account


def restart(data_dir: Path) -> None:
    """Restart the server as its administrator does: another process, with the options of the one before."""
    pgdata = data_dir / "pgdata"
    account = server_account(pgdata)
    told = subprocess.run(
        [
            str(find_bindir(None) / "pg_ctl"),
            "-D",
            str(pgdata),
            "-m",
            "fast",
            "-w",
            "restart",
            "-l",
            "/dev/null",
        ],
        capture_output=True,
        text=True,
        **account.popen_options(),
    )
    assert told.returncode == 0, told.stdout + told.stderr
