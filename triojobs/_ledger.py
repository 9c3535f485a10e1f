"""Who owns which claim in this process.

A claim enters in the thread that committed it, before anything can interrupt, and leaves in the
thread that committed its end. In between it is `booked` (not started), `running` (a handler has
it) or `ended` (its settlement waits to be written). Threads and the event loop both call in, so
every method takes the lock; none of them waits for anything else.

One ledger serves one registration: claims of different group ids never meet.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from ._model import Claim, Outcome, Settled, Settlement

__all__ = ["Ledger"]


class Ledger:
    """The claims of one registration.

    Args:
        on_ended: called (on the event loop, by `settle`) when something waits to be written.
    """

    def __init__(self, on_ended: Callable[[], None] = lambda: None) -> None:
        self._lock = threading.Lock()
        self._claims: dict[int, Claim] = {}
        self._booked: deque[Claim] = deque()
        self._ended: dict[int, Settlement] = {}
        self._on_ended = on_ended
        self.claimed = 0
        self.released = 0
        self.stale = 0
        self.settled: Counter[Outcome] = Counter()

    # In the thread that claims.

    def book(self, claims: Sequence[Claim]) -> None:
        """Take ownership of rows whose claim has just been committed."""
        with self._lock:
            for claim in claims:
                # A job can return while an older claim of it waits here for its settlement: the reply to
                # that one was lost or is late, but it was written, or nobody could have claimed the job.
                self._claims[claim.job_id] = claim  # first: see `owns`
                written = self._ended.pop(claim.job_id, None)
                if written is not None:
                    self._count(written.outcome)
            self._booked.extend(claims)
            self.claimed += len(claims)

    def known(self) -> list[tuple[int, int]]:
        """Return (job id, claim_no) of every claim owned here."""
        with self._lock:
            return [(claim.job_id, claim.claim_no) for claim in self._claims.values()]

    # In the thread that compared ledger and leases.

    def lose(self, missing: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Forget claims that the database does not know (any more), as stale; return them.

        One that has ended stays for its settlement: either that is what took the row away, or it
        will find nothing.
        """
        lost: list[tuple[int, int]] = []
        with self._lock:
            for job_id, claim_no in missing:
                claim = self._claims.get(job_id)
                if claim is not None and claim.claim_no == claim_no and job_id not in self._ended:
                    del self._claims[job_id]
                    self.stale += 1
                    lost.append((job_id, claim_no))
        return lost

    # On the event loop: no await stands between these calls and what they decide.

    def take_booked(self) -> list[Claim]:
        """Return the claims that no handler has been given yet; they count as handed out."""
        with self._lock:
            taken = list(self._booked)
            self._booked.clear()
        return taken

    def owns(self, claim: Claim) -> bool:
        """Return whether this claim is ours and has not ended."""
        # Without the lock, but in this order: whoever takes a settlement out of `_ended` has taken its claim
        # out of `_claims` before, and a claim never returns there.
        return claim.job_id not in self._ended and self._claims.get(claim.job_id) is claim

    def settle(self, claim: Claim, settlement: Settlement) -> bool:
        """Note how a claim ended. False: it had ended already (a commit did, or it is not ours)."""
        with self._lock:
            if self._claims.get(claim.job_id) is not claim or claim.job_id in self._ended:
                return False
            self._ended[claim.job_id] = settlement
        self._on_ended()
        return True

    def ended(self, limit: int) -> list[Settlement]:
        """Return up to `limit` settlements to write, ordered by job id; they stay until `close_out`."""
        with self._lock:
            batch = list(self._ended.values()) if len(self._ended) <= limit else []
            if not batch:
                for settlement in self._ended.values():
                    batch.append(settlement)
                    if len(batch) == limit:
                        break
        batch.sort(key=lambda s: s.job_id)
        return batch

    def release_rest(self) -> list[Settlement]:
        """Note every claim that has not ended as given back; return these settlements."""
        with self._lock:
            rest = [
                Settlement(claim.job_id, claim.claim_no, Outcome.RELEASED)
                for claim in self._claims.values()
                if claim.job_id not in self._ended
            ]
            self._ended.update((settlement.job_id, settlement) for settlement in rest)
            self._booked.clear()
        return rest

    @property
    def unsettled(self) -> int:
        """How many ended claims wait to be written."""
        return len(self._ended)

    @property
    def held(self) -> int:
        """How many claims are owned in all."""
        return len(self._claims)

    def claims(self) -> dict[int, Claim]:
        """Return all owned claims by their jobs' ids."""
        with self._lock:
            return dict(self._claims)

    def held_ids(self) -> list[int]:
        """Return the ids of all owned jobs."""
        with self._lock:
            return sorted(self._claims)

    # In the thread that committed the end of claims.

    def close_out(self, asked: Iterable[Settlement], written: Sequence[Settled]) -> list[Settlement]:
        """Forget what was asked for and written; return what was not written (stale claims)."""
        done = {(job_id, claim_no): outcome for job_id, claim_no, outcome in written}
        stale: list[Settlement] = []
        with self._lock:
            for settlement in asked:
                claim = self._claims.get(settlement.job_id)
                if claim is None or claim.claim_no != settlement.claim_no:
                    continue
                outcome = done.get((settlement.job_id, settlement.claim_no))
                if outcome is None:
                    stale.append(settlement)
                    self.stale += 1
                else:
                    self._count(outcome)
                del self._claims[settlement.job_id]
                self._ended.pop(settlement.job_id, None)
        return stale

    def committed(self, claim: Claim) -> None:
        """Book `done` for a claim whose end was committed together with the handler's writes."""
        with self._lock:
            if self._claims.get(claim.job_id) is claim:
                del self._claims[claim.job_id]
                self._ended.pop(claim.job_id, None)
                self.settled[Outcome.DONE] += 1

    def forget_all(self, written: Sequence[Settled]) -> list[int]:
        """After the closing: count what it wrote; return the ids it did not find (stale)."""
        with self._lock:
            for row in written:
                self._claims.pop(row.job_id, None)
                self._ended.pop(row.job_id, None)
                self._count(row.outcome)
            stale = sorted(self._claims)
            self.stale += len(stale)
            self._claims.clear()
            self._ended.clear()
            self._booked.clear()
        return stale

    def gave_back(self, number: int) -> None:
        """Count claims that the ledger never knew and a comparison released."""
        with self._lock:
            self.released += number

    def _count(self, outcome: Outcome) -> None:
        if outcome is Outcome.RELEASED:
            self.released += 1
        else:
            self.settled[outcome] += 1
