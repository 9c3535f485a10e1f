"""Sessions and databases as the tests of the SQL have them; their tools serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "postgres"))

from tests.postgres.conftest import connect, db, shared_database  # after the path that it needs

__all__ = ["connect", "db", "shared_database"]
