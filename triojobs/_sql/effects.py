"""What a piece of work on a connection gave, and whom to tell once it is committed."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Effect"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Effect(Generic[T]):
    """The value; queues in which something became claimable (sooner); groups that have requests."""

    value: T
    queues: frozenset[str] = frozenset()
    groups: frozenset[uuid.UUID] = frozenset()
