"""Wrong variants of the runtime, applied inside a worker process: a run must notice each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from triojobs import _group
from triojobs._sql import groups, settle


def changed(text: str, *changes: tuple[str, str]) -> Any:
    """Replace parts of a text; each must be there, or the mutant would be the original."""
    for old, new in changes:
        assert old in text, f"{old!r} is not there"
        text = text.replace(old, new)
    return text


def rescue_ignores_leases() -> None:
    """Every group is thought dead at every look."""
    groups.LOCK_LAPSED = changed(groups.LOCK_LAPSED, ("AND lease_until < clock_timestamp()", ""))  # type: ignore[misc]


def nobody_rescues() -> None:
    """What a dead process held stays where it is."""
    groups.LOCK_LAPSED = changed(groups.LOCK_LAPSED, ("WHERE", "WHERE false AND"))  # type: ignore[misc]


def settle_without_fence() -> None:
    """Whoever names the job ends it."""
    settle.SETTLE = changed(  # type: ignore[misc]
        settle.SETTLE, ("AND l.claim_no = a.claim_no AND l.group_id = %(group_id)s", "")
    )


def handlers_keep_on() -> None:
    """The end of the lease cancels nobody."""

    async def watch_nothing(live: Any, store: Any) -> None:
        return None

    _group.watch_lease = watch_nothing


def release_keeps_the_attempt() -> None:
    """What is given back untouched is charged."""
    settle.SETTLE = changed(  # type: ignore[misc]
        settle.SETTLE, ("e.attempt - 1", "e.attempt"), ("THEN 1 ELSE 0 END", "THEN 0 ELSE 0 END")
    )


def stale_settlements_are_written() -> None:
    """A settlement whose claim was taken away writes its outcome all the same (see CONSTRAINTS_DROPPED)."""
    settle.SETTLE = changed(  # type: ignore[misc]
        settle.SETTLE,
        (
            "), later AS (",
            """), again AS (
    INSERT INTO {schema}.outcomes (job_id, group_id, claim_no, attempt, status, result, encoding)
    SELECT a.id, %(group_id)s, a.claim_no, 1, a.outcome, a.result, a.encoding FROM asked a
    WHERE a.outcome = 'done' AND NOT EXISTS (SELECT FROM ended e WHERE e.id = a.id)
), later AS (""",
        ),
    )


# What the schema would refuse of some mutants, so that the checks must notice it.
CONSTRAINTS_DROPPED: Final = {
    "stale-settlements-are-written": (
        "ALTER TABLE triojobs.outcomes DROP CONSTRAINT outcomes_job_id_group_id_claim_no_key"
    ),
}
MUTANTS: Final[dict[str, Callable[[], None]]] = {
    each.__name__.replace("_", "-"): each
    for each in (
        rescue_ignores_leases,
        nobody_rescues,
        settle_without_fence,
        handlers_keep_on,
        release_keeps_the_attempt,
        stale_settlements_are_written,
    )
}


def apply(name: str) -> None:
    """Turn this process' runtime into a mutant."""
    MUTANTS[name]()
