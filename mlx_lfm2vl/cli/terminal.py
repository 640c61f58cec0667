"""What all commands share at a terminal: one way to parse, to write, to fail and to exit."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from .._version import __version__
from ..errors import Lfm2VlError, OutputError

# exit codes
READER_GONE = 1
BAD_INPUT = 2
INTERRUPTED = 130

# what a command tells in one line; MLX raises RuntimeError if memory or a file is lacking
TOLD = (Lfm2VlError, OSError, UnicodeError, MemoryError, RuntimeError)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the flag that was probably meant."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        given = sys.argv[1:] if args is None else list(args)
        if any("\0" in argument for argument in given):
            self.error("an argument holds a NUL character")
        given = _with_negatives(given)
        found, unknown = self.parse_known_args(given)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return found

    def _unknown(self, argument: str) -> str:
        import difflib

        flags = self._option_string_actions
        if not argument.startswith("-"):
            hint = f'; a question is --prompt "{argument}"' if "--prompt" in flags else ""
            return f"{argument} belongs to no flag{hint}"
        close = difflib.get_close_matches(argument.partition("=")[0], flags, 1)
        return f"{argument} is unknown" + (f"; did you mean {close[0]}?" if close else "")

    def error(self, message: str) -> NoReturn:
        tell(f"{self.prog}: error: {one_line(message)} (--help lists all flags)")
        sys.exit(BAD_INPUT)

    def _print_message(self, message: str, file: object = None) -> None:
        write(message)  # help or version; argparse's own way is silent about a full disk


def _with_negatives(given: list[str]) -> list[str]:
    """Arguments, with values such as -1s joined to their flags: argparse knows numbers alone."""
    joined: list[str] = []
    for argument in given:
        is_value = re.match(r"-\.?\d", argument) and not re.fullmatch(r"-\d*\.?\d+", argument)
        if is_value and joined and re.fullmatch(r"--\w[\w-]*", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def make_parser(
    prog: str, description: str, epilog: str | None = None, usage: str | None = None
) -> Parser:
    """The parser of a command, with --version."""
    parser = Parser(
        prog=prog,
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def run_command(prog: str, action: Callable[[], None]) -> NoReturn:
    """Runs an action, parsing included, and exits: 0 done, or the codes above."""
    code = 0
    try:
        with _quiet():
            _open_streams()
            action()
            flush()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else BAD_INPUT
    except KeyboardInterrupt:
        tell("")
        code = INTERRUPTED
    except BrokenPipeError:
        code = READER_GONE
    except TOLD as error:
        tell(f"{prog}: error: {message_of(error)}")
        code = BAD_INPUT
    _let_go()
    sys.exit(code)


def write(text: str) -> None:
    """Writes to standard output at once.

    Raises:
        OutputError: it cannot be written, other than because the reader has gone.
    """
    try:
        sys.stdout.write(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from None
    flush()


def flush() -> None:
    """Empties the buffer of standard output; errors as for `write`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from None


def tell(line: str) -> None:
    """A line on standard error, if anybody can read it."""
    with suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def message_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{error.filename}: "
        return one_line(name + error.strerror)
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """Text without line breaks, and without characters that would steer a terminal."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of libraries, unless Python was asked for them (-W)."""
    if sys.warnoptions:
        yield
        return
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _open_streams() -> None:
    """Standard streams that exist and can write any text.

    Nothing comes from a closed input, and nothing is told on a closed standard error.
    """
    if sys.stdin is None:
        sys.stdin = _devnull("r")
    if sys.stderr is None:
        sys.stderr = _devnull("w")
    if sys.stdout is None:
        sys.stdout = _devnull("w")
        raise OutputError("standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _devnull(mode: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(os.devnull, mode))


def _unwritable(error: OSError) -> OutputError:
    return OutputError(f"standard output cannot be written: {error.strerror or error}")


def _let_go() -> None:
    """What could not be written is not tried again at exit, where that would be told."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
