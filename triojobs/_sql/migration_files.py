"""Migration files: find them, read their headers, write them for another schema. No database here.

A file is `NNNN_words.sql`, begins with `--` comment lines (its header), and is applied in the order of
its name. Two directives may stand in the header, one per line:

* `-- transactional: false`: its statements run one by one outside a transaction. They are divided by
  lines that consist of `-- statement`, because a correct split at semicolons needs a SQL parser.
* `-- min_client: N`: clients of a generation below N must not use the schema once this is applied.

**The schema's name.** Files write `triojobs.` out, so psql runs them as they are. For another name these
places are rewritten to the quoted name, in whole words and lower case only:

* `triojobs` followed by a dot, in code, in dollar-quoted bodies and in string literals
  (`'triojobs.job_ids'::regclass` becomes `'"other".job_ids'::regclass`);
* `triojobs` after `SCHEMA` (and `IF [NOT] EXISTS`), and directly after `search_path =` or `search_path TO`.

Comments (`--` and `/* */`) and double-quoted identifiers stay as they are. Any other bare `triojobs`
outside of strings is refused rather than left pointing at the wrong schema. Callers pass a name that
`checked_schema` let through (`[a-z_][a-z0-9_]{0,39}`), so the quotes can never end early.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from .._errors import SchemaError
from .._options import DEFAULT_SCHEMA

FILE_NAME: Final = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
DIRECTIVE: Final = re.compile(r"--\s*(transactional|min_client)\s*:\s*(.*?)\s*")
STATEMENT_LINE: Final = re.compile(r"^-- statement[ \t]*$", re.MULTILINE)

# Alternatives in the order in which they must win; what opens first hides what is inside.
TOKENS: Final = re.compile(
    r"""
      (?P<kept>    --[^\n]* | /\*.*?\*/ | "(?:[^"]|"")*" )
    | (?P<string>  \b[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' )
    | (?P<dotted>  (?<![\w$.])triojobs(?=\.) )
    | (?P<before>  \b(?i: SCHEMA\s+(?:IF\s+(?:NOT\s+)?EXISTS\s+)? | search_path(?:\s*=\s*|\s+TO\s+) ) )
      triojobs(?![\w$.])
    | (?P<other>   (?<![\w$.])triojobs(?![\w$]) )
    """,
    re.VERBOSE | re.DOTALL,
)
DOTTED_IN_STRING: Final = re.compile(r"(?<![\w$.])triojobs(?=\.)")


@dataclass(frozen=True, kw_only=True)
class MigrationFile:
    """One file of `migrations/`, as shipped: `text` and `sha256` are those of the default schema."""

    name: str
    text: str
    sha256: str
    transactional: bool = True
    min_client: int = 1

    def statements(self, schema: str) -> list[str]:
        """Return what is sent at once: the whole file, or its parts when it is not transactional."""
        text = rewritten(self.text, schema=schema, name=self.name)
        if self.transactional:
            return [text]
        return [part for part in STATEMENT_LINE.split(text) if part.strip()]


def shipped_directory() -> Traversable:
    """Return the directory of this version's migrations.

    Raises:
        SchemaError: the installation has none.
    """
    packaged = files("triojobs") / "migrations"
    if packaged.is_dir():
        return packaged
    # Editable installs do not get the wheel's copy; there the repository is around the package.
    beside = Path(__file__).resolve().parents[2] / "migrations"
    if beside.is_dir():
        return beside
    raise SchemaError(
        "this installation of triojobs has no migrations directory",
        operation="reading the migrations",
        hint="install triojobs again from a wheel, or from a complete checkout",
    )


def read_files(directory: Path | None = None) -> list[MigrationFile]:
    """Read the `.sql` files of a directory, by default the shipped ones, in the order of their names.

    Raises:
        SchemaError: a name that is not `NNNN_words.sql`, a number used twice, a missing or wrong header.
    """
    source: Traversable = shipped_directory() if directory is None else directory
    found = sorted((entry for entry in source.iterdir() if entry.name.endswith(".sql")), key=lambda e: e.name)
    numbers: dict[str, str] = {}
    for entry in found:
        match = FILE_NAME.fullmatch(entry.name)
        if match is None:
            raise _refused(entry.name, "its name is not NNNN_words_in_lower_case.sql")
        first = numbers.setdefault(match[1], entry.name)
        if first != entry.name:
            raise _refused(entry.name, f"its number is taken by {first}")
    # read_text() makes \n of \r\n, so a checkout with other line ends keeps its checksums.
    return [parsed(entry.name, entry.read_text(encoding="utf-8")) for entry in found]


def parsed(name: str, text: str) -> MigrationFile:
    """Read the header of a file: the comment lines with which it begins."""
    if not text.startswith("--"):
        raise _refused(name, "it does not begin with a comment line that says why it exists")
    values = {"transactional": "true", "min_client": "1"}
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        if match := DIRECTIVE.fullmatch(line):
            values[match[1]] = match[2]
    if values["transactional"] not in ("true", "false"):
        raise _refused(name, f"transactional is {values['transactional']!r}, not true or false")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", values["min_client"]):
        raise _refused(name, f"min_client is {values['min_client']!r}, not a whole number from 1")
    return MigrationFile(
        name=name,
        text=text,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        transactional=values["transactional"] == "true",
        min_client=int(values["min_client"]),
    )


def rewritten(text: str, *, schema: str, name: str = "the text") -> str:
    """Return `text` with the default schema's name replaced as the module's header says.

    Raises:
        SchemaError: the name stands where it cannot be told what it means.
    """
    if schema == DEFAULT_SCHEMA:
        return text
    quoted = f'"{schema}"'

    def replacement(match: re.Match[str]) -> str:
        if match["kept"] is not None:
            return match[0]
        if match["string"] is not None:
            return DOTTED_IN_STRING.sub(quoted, match[0])
        if match["other"] is not None:
            line = text.count("\n", 0, match.start()) + 1
            raise _refused(name, f"line {line} names {DEFAULT_SCHEMA} in a place that cannot be rewritten")
        return (match["before"] or "") + quoted

    return TOKENS.sub(replacement, text)


def _refused(name: str, why: str) -> SchemaError:
    return SchemaError(
        f"the migration file {name} is refused: {why}",
        operation="reading the migrations",
        hint="correct the file; see migrations/README.rst",
    )
