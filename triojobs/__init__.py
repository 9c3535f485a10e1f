"""A durable job queue on PostgreSQL for Trio programs. See README.rst.

The public names are imported when the first of them is used: the command line is this package, too, and
a shell that completes a word, or shows a help, must not wait half a second for psycopg and trio.
"""

from typing import TYPE_CHECKING

from ._version import VERSION as __version__

if TYPE_CHECKING:
    from ._exports import *
else:

    def __getattr__(name):
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = _public_names()
        globals().update(public)
        if name == "__all__":  # of `from triojobs import *`
            return sorted(public)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *_public_names()})

    def _public_names():
        from . import _exports

        return {name: value for name, value in vars(_exports).items() if not name.startswith("_")}
