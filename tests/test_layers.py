"""The referee of the layers: imports point downwards only, and each tool stays in its rooms.

A new module must be entered here; if it fits no layer, change the house, not the rule.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "triojobs"
LAYERS = {
    0: "_errors _model _options _version _logs _admin_model _retention _middleware",
    1: "_lifecycle _ledger _lease _beacon _backoff _codec _queue _store _demand _memory_tables _memory_retention"
    " _explanation _diagnosis _instruments _positions",
    2: "_sql",
    3: "_bridge _commit _listener _beats _postgres _sync_store _wake _memory _admin_store _pruning",
    4: "_events _fetcher _handling _verdict _settler _heartbeat _comparison _stubborn _stacks _registration _keeper"
    " _group _job _flusher",
    5: "__init__ _exports _open _serve _client _outbox _sync_client _admin _sync_admin _admin_steps _admin_steering"
    " _explore _health _systemd testing",
    6: "__main__ cli board otel prometheus embedded _embedded_cluster _embedded_directory _embedded_programs",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}
# _exports only tries the import, to say what to install; the demo is written like a user's program.
PSYCOPG = {
    "_exports",
    "_sql",
    "_bridge",
    "_commit",
    "_listener",
    "_postgres",
    "_sync_store",
    "_admin_store",
    "cli",
    "board",
} | {name for name in LAYER_OF if "embedded" in name}
THREADS = {"_bridge", "cli"}
# Downwards but for these, each with its reason.
EXCEPTIONS = {
    ("_group", "_client"),  # a group lends a client that uses its connections
    ("_exports", "embedded"),  # re-exported; pgserver itself is imported when it is used
}
MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The name under which the layers list a module: its package, or its own."""
    return path.parts[0].removesuffix(".py")


def imports(path: Path, *, typing: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of each import; those under `if TYPE_CHECKING` only with `typing`."""
    tree = ast.parse((PACKAGE / path).read_text())
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            hidden.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ["triojobs", *path.parts[:-1]][: len(path.parts) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def rooms_imported(path: Path) -> Iterator[str]:
    for module, name in imports(path):
        if module == "triojobs":
            yield name if name in LAYER_OF or name.startswith("_") else "__init__"
        elif module.startswith("triojobs."):
            yield module.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_has_a_layer_and_imports_downwards_only(path: Path) -> None:
    mine = room(path)
    assert mine in LAYER_OF, f"no layer lists {path}"
    for other in rooms_imported(path):
        if other == mine or (mine, other) in EXCEPTIONS:
            continue
        assert other in LAYER_OF, f"{path} imports {other}, which no layer lists"
        assert LAYER_OF[other] <= LAYER_OF[mine], f"{path} imports {other} from above"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_tools_stay_in_their_rooms(path: Path) -> None:
    mine = room(path)
    found = {f"{module}.{name}".rstrip(".") for module, name in imports(path)}
    if mine not in PSYCOPG:
        assert not [name for name in found if name.split(".")[0] in ("psycopg", "psycopg_pool")]
    if LAYER_OF.get(mine, 0) <= 2:
        assert not [name for name in found if name.split(".")[0] in ("trio", "trio_util", "outcome")]
    tree = ast.parse((PACKAGE / path).read_text())
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    threads = {name for name in used | found if name.startswith(("trio.to_thread", "trio.from_thread"))}
    if mine not in THREADS:
        assert not threads, f"{path} uses {sorted(threads)}; threads are the bridge's"


@pytest.mark.parametrize("path", [p for p in MODULES if LAYER_OF.get(room(p)) == 4], ids=str)
def test_tasks_know_the_store_protocol_alone(path: Path) -> None:
    below = {other for other in rooms_imported(path) if LAYER_OF.get(other) in (2, 3)}
    assert below <= {"_wake"}, f"{path} imports {sorted(below)}"
