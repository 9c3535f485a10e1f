"""The options of one run, and the times that workers, disturbers and checks agree on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LEASE_DURATION: Final = 3.0  # seconds; short, so that a run sees many leases end
LEASE_MARGIN: Final = 1.0
BEAT_INTERVAL: Final = 0.4
STOP_AT_MOST: Final = 5 * LEASE_DURATION  # others need the lease's end, a rescue round and a claim
# The last beat before a stop may be this old when backends are being terminated: a stop that ended
# the lease took at least LEASE_DURATION minus this.
BEAT_LATENESS: Final = 4 * BEAT_INTERVAL

CONTROL: Final = "chaos"  # application_name of the driver's own look at the server: spared

GROUP_OPTIONS: Final[dict[str, Any]] = {
    "lease_duration": LEASE_DURATION,
    "lease_margin": LEASE_MARGIN,
    "beat_interval": BEAT_INTERVAL,
    "call_timeout": 2.0,
    "grace_period": 1.0,
    "close_timeout": 3.0,
    "poll_interval": 0.2,
    "listening_poll_interval": 1.0,
}


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        jobs: how many jobs the producers commit; handlers add more. workers: processes.
        stops: stops beyond a lease before the disturbances may end.
        seconds: the run is given up after so long. seed: of everything random on the driver's side.
        mutant: a wrong variant of the runtime for the workers (see `mutants`), or none.
        keep: a new directory for journals and stderr of all processes, to look at afterwards.
    """

    jobs: int = 5000
    workers: int = 4
    stops: int = 2
    seconds: float = 110.0
    seed: int = 0
    mutant: str | None = None
    keep: Path | None = None

    @property
    def span(self) -> float:
        """Seconds over which the jobs are enqueued: long enough for each disturbance to happen."""
        return max(8.0, self.jobs / 250)
