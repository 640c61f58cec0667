"""A conversation at the terminal: `python -m mlx_lfm2vl.generate --chat`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from ..errors import Lfm2VlError, PromptError
from ..generation.answer import GenerationResponse
from ..prompts.question import AnswerSettings
from ..serving.session import Session

HELP = """\
/image PATH   show an image (several wait for the next message together)
/undo         take back the last question and its answer
/reset        begin again; the system message stays
/save PATH    write the conversation to a file
/load PATH    go on with a saved conversation
/stats        statistics after each answer, on or off
/help         this list
/quit         leave, as does Ctrl-D; Ctrl-C stops an answer
"""


class Chat:
    """Reads lines, answers them, and obeys commands that begin with a slash."""

    def __init__(self, session: Session, settings: AnswerSettings, statistics: bool) -> None:
        self.session = session
        self.settings = settings
        self.statistics = statistics
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/undo": lambda _: self.session.undo(),
            "/reset": lambda _: self.session.reset(),
            "/save": lambda path: self.session.save(_required(path, "/save PATH")),
            "/load": lambda path: self.session.load(_required(path, "/load PATH")),
            "/stats": self._stats,
            "/help": lambda _: _write(HELP),
        }

    def run(self, images: Sequence[str] = (), message: str | None = None) -> None:
        """Shows the images, sends the message, and talks until the user leaves."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and history
        _write("Ask something; /image PATH shows an image, /help lists everything.\n")
        for image in images:
            self._obey(f"/image {shlex.quote(image)}")
        if message is not None:
            self._obey(message)
        while True:
            try:
                line = input("> ").strip()
                if line == "/quit":
                    return
                self._obey(line)
            except EOFError:
                _write("\n")
                return
            except KeyboardInterrupt:
                _write("\n(/quit or Ctrl-D leaves)\n")

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        try:
            if word in self.commands:
                self.commands[word](rest.strip())
            elif word.startswith("/"):
                _write(f"{word} is no command; /help lists them\n")
            elif line:
                self._answer(line)
        except (Lfm2VlError, OSError) as error:
            _write(" ".join(str(error).split()) + "\n")
        except KeyboardInterrupt:
            _write("\n(stopped; question and answer are not kept)\n")

    def _answer(self, message: str) -> None:
        response = None
        for response in self.session.stream_send(message, **self.settings):
            _write(response.text)
        _write("\n")
        if self.statistics and response is not None:
            self._write_statistics(response)

    def _image(self, path: str) -> None:
        parts = shlex.split(_required(path, "/image PATH"))
        for part in parts:
            start = time.perf_counter()
            self.session.see(part)
            usage = self.session.usage
            _write(f"({usage.processed_tokens} positions, {time.perf_counter() - start:.2f} s)\n")

    def _stats(self, _: str) -> None:
        self.statistics = not self.statistics
        _write(f"(statistics {'on' if self.statistics else 'off'})\n")

    def _write_statistics(self, last: GenerationResponse) -> None:
        usage = self.session.usage
        _write(
            f"(prompt {usage.prompt_tokens} tokens, {usage.reused_tokens} of them known; first "
            f"token after {last.time_to_first_token:.2f} s; {last.generation_tokens} tokens at "
            f"{last.generation_tps:.1f} tok/s; peak {last.peak_memory:.2f} GB)\n"
        )


def _required(argument: str, usage: str) -> str:
    if not argument:
        raise PromptError(f"usage: {usage}")
    return argument


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
