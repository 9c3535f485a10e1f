"""What a handler's end means: the classification of everything that it may raise."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import trio

from ._errors import Kill, RetryAfter, Snooze, sole_error
from ._lifecycle import outcome_of_failure
from ._model import Claim, Outcome
from ._options import ERROR_LIMIT

__all__ = ["Circumstances", "Verdict", "capped", "judge"]

CUT: Final = "…[truncated]"
TRACEBACK_FRAMES: Final = 20  # the innermost ones: where it happened


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What was going on around the handler when it raised.

    Attributes:
        cancel_reason: somebody asked to cancel this job. timed_out: its timeout had passed first.
        past_deadline: its deadline had passed first. interrupted: the group was stopping, was being
            cancelled, or had lost its lease.
    """

    cancel_reason: str | None = None
    timed_out: float | None = None
    past_deadline: bool = False
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """How to settle, and what goes on up.

    Attributes:
        delay: None means: by the worker's retry policy. log_error: an error that the outcome does
            not carry. propagate: what to raise after settling.
    """

    outcome: Outcome
    error: str | None = None
    delay: float | None = None
    log_error: BaseException | None = None
    propagate: BaseException | None = None


def judge(exc: BaseException, claim: Claim, around: Circumstances) -> Verdict:
    """Return what `exc`, raised by the handler of `claim`, means."""
    cancelled, rest = _split(exc)
    fatal = next((leaf for leaf in _leaves(exc) if _is_fatal(leaf)), None)
    if isinstance(fatal, KeyboardInterrupt):
        # The person at the keyboard, not the job: give it back untouched.
        return Verdict(Outcome.RELEASED, propagate=exc)
    failed = outcome_of_failure(claim.attempt, claim.max_attempts)
    if fatal is not None:
        # SystemExit and its like end the program. The attempt counts, or a job that exits would be
        # run again for ever.
        return Verdict(failed, describe(exc), propagate=exc)
    signal = sole_error(rest)  # a nursery in the handler wraps its signals
    if isinstance(signal, Kill):
        return Verdict(Outcome.KILLED, capped(signal.reason), propagate=cancelled)
    if isinstance(signal, Snooze):
        return Verdict(Outcome.SNOOZED, delay=signal.seconds, propagate=cancelled)
    if around.cancel_reason is not None:
        return Verdict(Outcome.CANCELLED, capped(around.cancel_reason), log_error=rest, propagate=cancelled)
    if around.past_deadline:
        return Verdict(Outcome.KILLED, "past its deadline", log_error=rest, propagate=cancelled)
    if around.timed_out is not None:
        text = f"timed out after {around.timed_out:g} s"
        error = text if rest is None else capped(f"{text}; while being cancelled:\n{describe(rest)}")
        return Verdict(failed, error, propagate=cancelled)
    if around.interrupted or rest is None:
        return Verdict(Outcome.RELEASED, log_error=rest, propagate=cancelled)
    if isinstance(signal, RetryAfter):
        return Verdict(failed, capped(str(signal)), delay=signal.seconds, propagate=cancelled)
    return Verdict(failed, describe(rest), propagate=cancelled)


def describe(exc: BaseException) -> str:
    """Return type, message and the innermost frames of an error, capped to 8 KiB."""
    try:
        head = "".join(traceback.format_exception_only(exc)).strip()
    except Exception as broken:  # a __str__ that raises must not cost the job its outcome
        head = f"{type(exc).__qualname__} (its text cannot be shown: {type(broken).__qualname__})"
    try:
        frames = "".join(traceback.format_tb(exc.__traceback__, -TRACEBACK_FRAMES))
        parts = "".join(f"\n{describe(inner)}" for inner in getattr(exc, "exceptions", ())[:10])
    except Exception:
        frames, parts = "", ""
    return capped(f"{head}{parts}\n{frames}".rstrip())


def capped(text: str, limit: int = ERROR_LIMIT) -> str:
    """Return `text` without NUL, cut on a character boundary to `limit` bytes with a marker."""
    data = text.replace("\0", "�").encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - len(CUT.encode())].decode(errors="ignore") + CUT


def _split(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Return the part that is Cancelled, which must go on up, and the rest."""
    if isinstance(exc, trio.Cancelled):
        return exc, None
    if isinstance(exc, BaseExceptionGroup):
        return exc.split(trio.Cancelled)
    return None, exc


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc


def _is_fatal(exc: BaseException) -> bool:
    return not isinstance(exc, Exception | trio.Cancelled)
