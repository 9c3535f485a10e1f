"""Migration files without a database: names, headers, and another schema's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from triojobs._errors import OptionError, SchemaError
from triojobs._options import checked_schema
from triojobs._sql.migration_files import parsed, read_files, rewritten

REWRITTEN = [
    ("SELECT * FROM triojobs.jobs", 'SELECT * FROM "other".jobs'),
    ("nextval('triojobs.job_ids'::regclass)", "nextval('\"other\".job_ids'::regclass)"),
    ("CREATE SCHEMA triojobs;", 'CREATE SCHEMA "other";'),
    ("CREATE SCHEMA IF NOT EXISTS triojobs;", 'CREATE SCHEMA IF NOT EXISTS "other";'),
    ("GRANT USAGE ON SCHEMA triojobs TO web", 'GRANT USAGE ON SCHEMA "other" TO web'),
    ("SET search_path = triojobs, pg_temp", 'SET search_path = "other", pg_temp'),
    ("SET search_path TO triojobs", 'SET search_path TO "other"'),
    ("$$ SELECT triojobs.f(); $$", '$$ SELECT "other".f(); $$'),
    (r"E'it\'s' || triojobs.f()", r"""E'it\'s' || "other".f()"""),
    ("'it''s' || triojobs.f()", "'it''s' || \"other\".f()"),
    ("-- don't touch triojobs.jobs\ntriojobs.jobs", '-- don\'t touch triojobs.jobs\n"other".jobs'),
    ("/* triojobs.a' */ triojobs.b", '/* triojobs.a\' */ "other".b'),
]
UNTOUCHED = [
    "-- a note about triojobs and SCHEMA triojobs",
    "SELECT 'triojobs', 'run triojobs migrate'",
    'SELECT 1 AS "triojobs"',
    "SELECT my_triojobs.x, triojobs_old.y, x.triojobs.y",
    "'see mytriojobs.org'",
]
REFUSED = [
    "GRANT ALL ON SCHEMA public, triojobs TO web",
    "SELECT 1 AS triojobs",
    "$$ search_path = a, triojobs $$",
]


@pytest.mark.parametrize(("text", "expected"), REWRITTEN)
def test_the_schema_is_rewritten_where_it_is_a_schema(text: str, expected: str) -> None:
    assert rewritten(text, schema="other") == expected


@pytest.mark.parametrize("text", UNTOUCHED)
def test_other_occurrences_of_the_word_stay(text: str) -> None:
    assert rewritten(text, schema="other") == text


@pytest.mark.parametrize("text", REFUSED)
def test_a_bare_name_that_cannot_be_told_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(SchemaError, match=r"0003_x\.sql is refused: line 2 names triojobs"):
        rewritten(f"-- why\n{text}", schema="other", name="0003_x.sql")


@pytest.mark.parametrize("text", [text for text, _ in REWRITTEN] + UNTOUCHED + REFUSED)
def test_the_default_schema_changes_nothing(text: str) -> None:
    assert rewritten(text, schema="triojobs") == text


def test_each_shipped_file_can_be_written_for_another_schema() -> None:
    for file in read_files():
        assert file.statements("other")


@pytest.mark.parametrize("name", ["a", "_", "user", "jobs_2", "a" * 40])
def test_plain_schema_names_are_accepted(name: str) -> None:
    assert checked_schema(name) == name


@pytest.mark.parametrize(
    "name", ["", "Jobs", "2jobs", "a-b", 'a"b', "a b", "jobs\n", "a" * 41, "é", "a.b", None]
)
def test_schema_names_that_need_quoting_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="schema is "):
        checked_schema(name)


def test_a_header_without_directives_means_one_transaction_for_every_client() -> None:
    file = parsed("0001_x.sql", "-- why\nSELECT 1;\n")
    assert (file.transactional, file.min_client) == (True, 1)


def test_directives_are_read_from_the_header_only() -> None:
    file = parsed("0001_x.sql", "-- why\n-- min_client: 3\nSELECT 1;\n-- transactional: false\n")
    assert (file.transactional, file.min_client) == (True, 3)


def test_a_file_without_transaction_is_split_at_statement_lines() -> None:
    text = (
        "-- why\n-- transactional: false\nSELECT 1;\n-- statement\nSELECT 2; -- statement\n-- statement\n\n"
    )
    parts = parsed("0001_x.sql", text).statements("triojobs")
    assert [part.strip().splitlines()[-1] for part in parts] == ["SELECT 1;", "SELECT 2; -- statement"]


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1;",
        "-- transactional: no\n",
        "-- min_client: 0\n",
        "-- min_client: two\n",
        "-- min_client:\n",
        "",
    ],
)
def test_a_missing_or_wrong_header_is_refused(text: str) -> None:
    with pytest.raises(SchemaError, match=r"0001_x\.sql is refused"):
        parsed("0001_x.sql", text)


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("0010_c.sql", "0002_b.sql", "0001_a.sql", "README.rst"):
        (tmp_path / name).write_text("-- why\n")
    assert [file.name for file in read_files(tmp_path)] == ["0001_a.sql", "0002_b.sql", "0010_c.sql"]


@pytest.mark.parametrize("name", ["1_a.sql", "0001-a.sql", "0001_A.sql", "notes.sql"])
def test_a_file_that_would_be_missed_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("-- why\n")
    with pytest.raises(SchemaError, match="its name is not NNNN"):
        read_files(tmp_path)


def test_a_number_used_twice_is_refused(tmp_path: Path) -> None:
    for name in ("0001_a.sql", "0001_b.sql"):
        (tmp_path / name).write_text("-- why\n")
    with pytest.raises(SchemaError, match=r"0001_b\.sql is refused: its number is taken by 0001_a\.sql"):
        read_files(tmp_path)


def test_line_ends_do_not_change_the_checksum(tmp_path: Path) -> None:
    (tmp_path / "0001_a.sql").write_bytes(b"-- why\r\nSELECT 1;\r\n")
    windows = read_files(tmp_path)[0].sha256
    (tmp_path / "0001_a.sql").write_bytes(b"-- why\nSELECT 1;\n")
    assert read_files(tmp_path)[0].sha256 == windows
