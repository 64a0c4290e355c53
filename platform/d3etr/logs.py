"""Loggers whose records hold no credentials and nothing that acts on a terminal."""

from __future__ import annotations

import logging
import traceback

from d3etr.text import LINES, printable, redacted


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of ours."""
    logger = logging.getLogger(name)
    logger.addFilter(make_plain)
    return logger


def make_plain(record: logging.LogRecord) -> bool:
    """Take from a record what must not leave the process; keeps every record."""
    record.msg, record.args = printable(redacted(record.getMessage()), LINES), ()
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = redacted("".join(traceback.format_exception(*record.exc_info)).rstrip())
    return True
