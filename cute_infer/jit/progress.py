"""Telling people that a kernel is being compiled: a spinner on a terminal, and always one log line when it is done."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from ..config import get_config

log = logging.getLogger("cute_infer.jit")


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Around one compilation of ``what`` ("decode_sm90 for sm_90a: <spec>")."""
    started = time.perf_counter()
    with _spinner(f"compiling {what}"):
        yield
    log.info("compiled %s in %.1f s", what, time.perf_counter() - started)


@contextlib.contextmanager
def _spinner(text: str) -> Iterator[None]:
    if get_config().progress == "off" or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
