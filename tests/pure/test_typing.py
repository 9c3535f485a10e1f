"""The annotations serve users' programs, and keep up with what they describe."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import triojobs
from triojobs._open import GroupKeywords


def test_a_strict_type_checker_accepts_a_users_program_and_finds_its_mistakes() -> None:
    """Comments in the program mark its mistakes; one that is not found is an error, too."""
    program = Path(__file__).with_name("typed_program.py")
    told = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", str(program)],
        capture_output=True,
        text=True,
        cwd=Path(triojobs.__file__).parents[1],
    )
    assert told.returncode == 0, told.stdout + told.stderr


def test_serve_takes_the_keywords_of_open_worker_group() -> None:
    keywords = {
        name: parameter.annotation
        for name, parameter in inspect.signature(triojobs.open_worker_group).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert {name: hint.__forward_arg__ for name, hint in GroupKeywords.__annotations__.items()} == keywords


def test_every_form_of_enqueue_takes_the_options_of_a_new_job() -> None:
    options = [field.name for field in fields(triojobs.NewJob) if field.name != "payload"]
    assert sorted(triojobs.JobOptions.__annotations__) == sorted(options)
