"""Errors, exit codes and Ctrl-C at a terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..errors import Lfm2VlError

BAD_INPUT = 2  # exit code
INTERRUPTED = 130


def run_command(prog: str, action: Callable[[], None]) -> NoReturn:
    """Runs an action and exits: 0 done, 1 nobody reads on, 2 bad input, 130 interrupted."""
    try:
        action()
    except Lfm2VlError as error:
        one_line = " ".join(str(error).split())
        sys.stderr.write(f"{prog}: error: {one_line}\n")
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # the reader has gone; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits until the work looks: yields a function that tells whether it came."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)
