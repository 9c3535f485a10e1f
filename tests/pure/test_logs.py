"""Our loggers: as `logging`, but nothing that a user's handler raises comes out."""

from __future__ import annotations

import inspect
import logging

import pytest

from triojobs._logs import Log

log = Log("triojobs.test")


def test_a_record_says_which_line_logged_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="triojobs")
    lines = []
    for say in (log.debug, log.info, log.warning, log.error, log.critical):
        lines.append(inspect.currentframe().f_lineno + 1)  # type: ignore[union-attr]
        say("%d of %s", 1, "two", extra={"event": "tested"})
    lines.append(inspect.currentframe().f_lineno + 1)  # type: ignore[union-attr]
    log.log(logging.INFO, "said")
    assert [(r.pathname, r.lineno) for r in caplog.records] == [(__file__, line) for line in lines]
    assert [r.levelname for r in caplog.records] == ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "INFO"]
    assert caplog.messages == ["1 of two"] * 5 + ["said"]
    assert caplog.records[0].event == "tested"  # type: ignore[attr-defined]


def test_an_exception_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("inner")
    except ValueError:
        log.exception("told")
    assert "ValueError: inner" in caplog.text


@pytest.mark.parametrize("where", ["handler", "filter", "arguments"])
def test_what_a_handler_raises_goes_to_stderr_and_not_to_us(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise RuntimeError("the disk is full")

    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("the disk is full")

    handler = logging.Handler()
    handler.emit = fail if where == "handler" else logging.LogRecord.getMessage  # type: ignore[method-assign, assignment]
    if where == "filter":
        handler.addFilter(fail)
    logger = logging.getLogger("triojobs.test")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        log.error("said %s", Unprintable() if where == "arguments" else "this")
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    assert "RuntimeError: the disk is full" in capsys.readouterr().err


def test_where_logging_is_told_to_be_silent_so_are_we(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(logging.getLogger("triojobs.test"), "isEnabledFor", lambda level: 1 / 0)
    log.error("said")
    assert capsys.readouterr().err == ""
