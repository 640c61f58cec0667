"""A conversation at the terminal: `python -m mlx_lfm2vl.generate --chat`."""

from __future__ import annotations

import argparse
import errno
import glob
import io
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import OutputError, PromptError
from ..generation.answer import GenerationResponse
from ..prompts.question import Question
from ..serving.session import Session
from .options import SAMPLING, is_text, path, whole
from .terminal import TOLD, message_of, write

LEAVE = ("/quit", "exit", "quit", ":q")
BLOCK = '"""'
SUFFIX = ".safetensors"
SETTINGS: dict[str, Callable[[str], Any]] = {
    **{name: kind for name, kind, _ in SAMPLING},
    "max_tokens": whole,
    "seed": whole,
    "stop": lambda value: _split(value) or [value],
}
HELP = (
    ("/image PATH", "show an image (several wait for the next message together)"),
    ("/video PATH", "show a film, or some frames of it: /video PATH 32"),
    ("/undo", "take back the last question and its answer"),
    ("/reset", "begin again; the system message stays, images are forgotten"),
    ("/system TEXT", "set the system message before the first question; alone: show it"),
    ("/set NAME X", "change a setting, as in: /set temperature 0.2; alone: show all"),
    ("/save PATH", "write the conversation to a file; /save! replaces another file"),
    ("/load PATH", "continue a saved conversation"),
    ("/stats", "statistics after each answer, on or off"),
    ("/help", "this list"),
    ("/quit", "leave, as do exit, quit, :q and Ctrl-D; Ctrl-C stops an answer"),
    ('"""', "begins and ends a message of several lines; a line that ends in \\ continues, too"),
)


class Chat:
    """Reads lines, answers them, and obeys commands that begin with a slash.

    Whatever goes wrong is told in one line, and the conversation stays.
    """

    def __init__(
        self,
        session: Session,
        settings: dict[str, Any],
        statistics: bool,
        notice: Callable[[Any], None] = lambda image: None,
    ) -> None:
        """Begins to talk.

        Args:
            settings: a value for each name in `SETTINGS`; None is the default.
            statistics: tell speeds after each answer.
            notice: called with each image that was shown.
        """
        self.session = session
        self.settings = settings
        self.statistics = statistics
        self.notice = notice
        self.unsaved = 0  # turns
        self.files: set[Path] = set()  # saved to or loaded from in this conversation
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/video": self._video,
            "/undo": self._undo,
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
            "/save!": lambda rest: self._save(rest, replace=True),
            "/load": self._load,
            "/stats": self._stats,
            "/help": lambda _: write(help_text(shutil.get_terminal_size().columns)),
        }

    def run(
        self,
        images: Sequence[str] = (),
        message: str | None = None,
        videos: Sequence[str] = (),
        frames: int | None = None,
    ) -> None:
        """Shows images and films, sends the message, and talks until the user leaves."""
        self._prepare_input()
        write("Ask something; /help lists the rest.\n")
        for image in images:
            self._try(self._see, image)
        for video in videos:
            self._try(partial(self._film, frames), video)
        if message is not None:
            self._try(self._answer, message)
        while True:
            try:
                line = _read_message()
                if line.strip() in LEAVE:
                    break
                self._try(self._obey, line)
            except EOFError:
                write("\n")
                break
            except KeyboardInterrupt:
                write("\n(/quit or Ctrl-D leaves)\n")
        if self.unsaved:
            write(f"({_count(self.unsaved, 'turn')} not saved)\n")

    def complete(self, line: str) -> list[str]:
        """What a line may become: commands first, then names of files or settings."""
        word, space, rest = line.partition(" ")
        if not space:
            return [name for name in (*self.commands, "/quit") if line and name.startswith(line)]
        if word == "/set":
            return [f"{word} {name} " for name in SETTINGS if name.startswith(rest)]
        if word not in ("/image", "/video", "/save", "/save!", "/load"):
            return []
        start = path(rest.lstrip("\"'"))
        return [
            f"{word} {name}{'/' if os.path.isdir(name) else ''}"
            for name in sorted(glob.glob(glob.escape(start) + "*"))
        ]

    def _prepare_input(self) -> None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            # a line that is not UTF-8 is refused by itself, and names of files may be such
            sys.stdin.reconfigure(errors="surrogateescape")
        with suppress(ImportError):
            import readline  # gives input() line editing and history

            found: list[str] = []

            def complete(text: str, state: int) -> str | None:
                if state == 0:
                    found[:] = self.complete(text)
                return found[state] if state < len(found) else None

            readline.set_completer(complete)
            readline.set_completer_delims("")  # names of files may have spaces
            is_libedit = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")

    def _try(self, action: Callable[[str], None], argument: str) -> None:
        """Does something; the conversation survives what goes wrong."""
        try:
            action(argument)
        except BrokenPipeError:
            raise  # nobody listens
        except (*TOLD, ValueError, argparse.ArgumentTypeError) as error:
            write(message_of(error) + "\n")
        except KeyboardInterrupt:
            write("\n(stopped; nothing of it is kept)\n")

    def _obey(self, line: str) -> None:
        if line.lstrip().startswith(BLOCK):
            self._answer(line.strip().removeprefix(BLOCK).removesuffix(BLOCK).strip("\n"))
            return
        word, rest = (*line.split(maxsplit=1), "", "")[:2]
        if word in self.commands:
            self.commands[word](rest.strip())
        elif word.startswith("/"):
            write(f"{word} is no command; /help lists them\n")
        elif word:
            self._answer(line.strip())

    def _answer(self, message: str) -> None:
        _check_text(message)
        response = None
        for response in self.session.stream_send(message, **self._given):
            write(response.text)
        self.unsaved += 1
        write("\n")
        if self.statistics and response is not None:
            self._write_statistics(response)

    @property
    def _given(self) -> dict[str, Any]:
        """The settings that are not left to the checkpoint."""
        return {name: value for name, value in self.settings.items() if value is not None}

    def _image(self, rest: str) -> None:
        for image in image_paths(_required(rest, "/image PATH")):
            self._see(image)

    def _video(self, rest: str) -> None:
        name, _, frames = _required(rest, "/video PATH [FRAMES]").rpartition(" ")
        count = int(frames) if name and frames.isdecimal() else None
        self._film(count, file_path(rest if count is None else name))

    def _film(self, frames: int | None, video: str) -> None:
        self._show(video, lambda: self.session.see_video(video, frames))

    def _see(self, image: str) -> None:
        self._show(image, lambda: self.session.see(image))
        self.notice(image)

    def _show(self, name: str, see: Callable[[], None]) -> None:
        start = time.perf_counter()
        see()
        positions = self.session.usage.processed_tokens
        write(f"({name}: {positions} positions, {time.perf_counter() - start:.2f} s)\n")

    def _undo(self, _: str) -> None:
        self.session.undo()
        self.unsaved = max(0, self.unsaved - 1)
        waiting = self._waiting
        images = f"; {_count(waiting, 'image')} waiting again" if waiting else ""
        write(f"(taken back: the last question and its answer{images})\n")

    def _reset(self, _: str) -> None:
        images = self._waiting + self._shown
        self.session.reset()
        forgotten = f"; {_count(images, 'image')} forgotten" if images else ""
        write(f"(begun again{forgotten}{self._not_saved()})\n")

    def _system(self, rest: str) -> None:
        messages = self.session.messages
        system = [message for message in messages if message["role"] == "system"]
        if not rest:
            write(f"{system[0]['content'] if system else '(there is no system message)'}\n")
            return
        if self._turns:
            raise PromptError("the system message comes before the first question; /reset first")
        _check_text(rest)
        self.session.messages = [{"role": "system", "content": rest}]
        write("(system message set)\n")

    def _set(self, rest: str) -> None:
        name, value = (*rest.split(maxsplit=1), "", "")[:2]
        name = "temperature" if name == "temp" else name.replace("-", "_")
        if name and name not in SETTINGS:
            raise PromptError(f"there is no setting {name}; there are {', '.join(SETTINGS)}")
        if value:
            found = None if value == "default" else SETTINGS[name](value)
            _check_text(value)
            if found is not None:
                Question("?", **{name: found})
            self.settings[name] = found
        asked = Question("?", **self._given)
        recommended = self.session.processor.generation_config.sampling
        used = {
            **asdict(asked.sampling.apply(recommended)),
            "max_tokens": asked.max_tokens,
            "seed": asked.seed,
            "stop": shlex.join(asked.stop) or None,
        }
        for shown in (name,) if name else SETTINGS:
            write(f"({shown} {'none' if used[shown] is None else used[shown]})\n")

    def _save(self, rest: str, replace: bool = False) -> None:
        file = Path(file_path(_required(rest, "/save PATH")))
        if file.suffix != SUFFIX:
            file = file.with_name(file.name + SUFFIX)
        if not file.parent.is_dir():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(file.parent))
        if file.exists() and file.resolve() not in self.files and not replace:
            raise OutputError(f"{file} is there already; /save! {file} replaces it")
        self.session.save(file)
        self.unsaved = 0
        self.files.add(file.resolve())
        write(f"(saved {file}: {self._about})\n")

    def _load(self, rest: str) -> None:
        name = file_path(_required(rest, "/load PATH"))
        file = next((f for f in (name, name + SUFFIX) if os.path.isfile(f)), name)
        self.session.load(file)
        self.files.add(Path(file).resolve())
        write(f"(loaded {file}: {self._about}{self._not_saved()})\n")

    def _not_saved(self) -> str:
        """Says how much of what the user leaves was never saved."""
        left, self.unsaved = self.unsaved, 0
        return f"; {_count(left, 'turn')} before it not saved" if left else ""

    @property
    def _turns(self) -> int:
        return sum(message["role"] == "assistant" for message in self.session.messages)

    @property
    def _shown(self) -> int:
        """Images in the turns so far."""
        contents = [message["content"] for message in self.session.messages]
        return sum(
            item["type"] == "image" for items in contents if isinstance(items, list)
            for item in items
        )  # fmt: skip

    @property
    def _waiting(self) -> int:
        """Images that wait for the next message."""
        return sum(item["type"] == "image" for item in self.session.pending)

    @property
    def _about(self) -> str:
        images = self._shown + self._waiting
        return f"{_count(self._turns, 'turn')}, {_count(images, 'image')}"

    def _stats(self, _: str) -> None:
        self.statistics = not self.statistics
        write(f"(statistics {'on' if self.statistics else 'off'})\n")

    def _write_statistics(self, last: GenerationResponse) -> None:
        usage = self.session.usage
        write(
            f"(prompt {usage.prompt_tokens} tokens, {usage.reused_tokens} of them known; first "
            f"token after {last.time_to_first_token:.2f} s; {last.generation_tokens} tokens at "
            f"{last.generation_tps:.1f} tok/s; peak {last.peak_memory:.2f} GB)\n"
        )


def help_text(columns: int) -> str:
    """The commands, in lines that fit a terminal."""
    return "".join(
        textwrap.fill(
            meaning,
            max(columns - 1, 30),
            initial_indent=f"{usage:<13} ",
            subsequent_indent=" " * 14,
        )
        + "\n"
        for usage, meaning in HELP
    )


def image_paths(rest: str) -> list[str]:
    """The images that the rest of a line names: one path with spaces, or several in a row."""
    parts = [path(part) for part in _split(rest)]
    several = len(parts) > 1 and any(map(_is_there, parts)) and not os.path.exists(path(rest))
    return parts if several else [file_path(rest)]


def file_path(rest: str) -> str:
    """The one path that the rest of a line names, quoted as in a shell or not."""
    if "\0" in rest:
        raise PromptError("a path cannot hold a NUL character")
    parts = _split(rest)
    return path(rest if os.path.exists(path(rest)) or len(parts) != 1 else parts[0])


def _is_there(image: str) -> bool:
    return image.startswith(("http:", "https:", "data:")) or os.path.exists(image)


def _split(line: str) -> list[str]:
    """The words of a line as a shell takes them; none if its quotes do not match."""
    try:
        return shlex.split(line)
    except ValueError:
        return []


def _read_message() -> str:
    """A line, or several: a block, or lines that end in a backslash."""
    line = input("> ")
    with suppress(EOFError):  # as an end of the message
        if line.lstrip().startswith(BLOCK):
            while not (line.rstrip().endswith(BLOCK) and len(line.strip()) >= 2 * len(BLOCK)):
                line += "\n" + input(". ")
            return line
        while line.endswith("\\"):
            line = line[:-1] + "\n"
            line += input(". ")
    return line


def _check_text(message: str) -> None:
    if not is_text(message):
        raise PromptError("the line is not UTF-8; it was not sent")


def _required(argument: str, usage: str) -> str:
    if not argument:
        raise PromptError(f"usage: {usage}")
    return argument


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
