"""Our loggers: what a user's log handler or filter raises stays with it.

`logging` lets such an error out of the call that logs. In the midst of a settlement or a closing it would
end the group, for a full disk or a bug in somebody's formatter.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["Log"]

CALLER: Final = 3  # frames from `Logger.log` up to the line that logs: `_log`, `warning`, that line


class Log:
    """A logger of that name whose methods never raise an Exception.

    Threads: any, as with every logger.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def log(self, level: int, text: str, *args: object, extra: Mapping[str, Any] | None = None) -> None:
        self._log(level, text, args, extra)

    def debug(self, text: str, *args: object, extra: Mapping[str, Any] | None = None) -> None:
        self._log(logging.DEBUG, text, args, extra)

    def info(self, text: str, *args: object, extra: Mapping[str, Any] | None = None) -> None:
        self._log(logging.INFO, text, args, extra)

    def warning(self, text: str, *args: object, extra: Mapping[str, Any] | None = None) -> None:
        self._log(logging.WARNING, text, args, extra)

    def error(self, text: str, *args: object, extra: Mapping[str, Any] | None = None) -> None:
        self._log(logging.ERROR, text, args, extra)

    def critical(self, text: str, *args: object, extra: Mapping[str, Any] | None = None) -> None:
        self._log(logging.CRITICAL, text, args, extra)

    def exception(self, text: str, *args: object, extra: Mapping[str, Any] | None = None) -> None:
        """As `error`, with the traceback of the exception being handled."""
        self._log(logging.ERROR, text, args, extra, exc_info=True)

    def _log(
        self,
        level: int,
        text: str,
        args: tuple[object, ...],
        extra: Mapping[str, Any] | None,
        *,
        exc_info: bool = False,
    ) -> None:
        try:
            self._logger.log(level, text, *args, extra=extra, exc_info=exc_info, stacklevel=CALLER)
        except Exception:
            if logging.raiseExceptions:  # as logging's own handlers tell of theirs
                traceback.print_exc()
