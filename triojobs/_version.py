"""The version of this distribution, from its metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["VERSION"]

try:
    VERSION = version("triojobs")
except PackageNotFoundError:  # run from a tree that was never installed
    VERSION = "0+unknown"
