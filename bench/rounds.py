"""Rounds and ratios: how single runs become one line of output.

All contenders run once in each round, in an order that rotates, so that what else the machine does hits
all alike. A ratio is taken within each round; a line reports the median of the ratios with the lowest
and the highest of them as its spread, beside the medians of both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import Any, TypeAlias, TypeVar

import click

__all__ = ["Line", "alone", "compare", "interleave", "number", "show"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Line: TypeAlias = dict[str, Any]


def interleave(runs: Mapping[Key, Callable[[], Value]], rounds: int) -> dict[Key, list[Value]]:
    """Run everything once a round; return what each returned, round by round."""
    results: dict[Key, list[Value]] = {key: [] for key in runs}
    keys = list(runs)
    for n in range(rounds):
        first = n % len(keys)
        for key in keys[first:] + keys[:first]:
            results[key].append(runs[key]())
            click.echo(f"round {n + 1} of {rounds}, {key}: {results[key][-1]}", err=True)
    return results


def compare(
    what: str,
    against: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    unit: str,
    config: str,
    **more: Any,
) -> Line:
    """Return the line that sets our runs beside those of the same rounds of somebody else.

    `ratio` is ours / peer, whichever way is better.
    """
    ratios = [mine / other for mine, other in zip(ours, peer, strict=True)]
    return {
        "what": what,
        "against": against,
        "ours": median(ours),
        "peer": median(peer),
        "ratio": round(median(ratios), 4),
        "rounds": len(ratios),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "unit": unit,
        "config": config,
        **more,
    }


def alone(what: str, ours: Sequence[float], *, unit: str, config: str, **more: Any) -> Line:
    """Return the line of a measure that stands beside nothing; its spread is that of the values."""
    return {
        "what": what,
        "against": None,
        "ours": median(ours),
        "peer": None,
        "ratio": None,
        "rounds": len(ours),
        "spread": [min(ours), max(ours)],
        "unit": unit,
        "config": config,
        **more,
    }


def number(value: float) -> str:
    """Return a figure with four digits that count, and no exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def show(line: Line, *, as_json: bool) -> None:
    """Print a line for programs or for people."""
    if as_json:
        click.echo(json.dumps(line))
        return
    low, high = line["spread"]
    beside = f"  {number(low)} to {number(high)}"
    if line["peer"] is not None:
        beside = (
            f"  {line['against']} {number(line['peer'])}  ratio {line['ratio']:.3f} ({low:.2f} to {high:.2f})"
        )
    click.echo(f"{line['what']}: {number(line['ours'])} {line['unit']}{beside}  [{line['config']}]")
