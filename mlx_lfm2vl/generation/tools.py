"""Tool calls while they are written: what became certain of them with each token."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..errors import AnswerError
from ..prompts.tool_calls import parse_block


@dataclass(frozen=True)
class ToolCallDelta:
    """What became certain of a call.

    Attributes:
        index: which call of the answer, counted from 0.
        name: of the tool; only in the first delta of a call.
        arguments: a part of the arguments' JSON text; all of a call's make one JSON object.
    """

    index: int
    name: str | None = None
    arguments: str = ""


class ToolCallStream:
    """Takes the text between two marks piece by piece, and tells what became certain of its calls.

    A name is certain at its bracket, an argument when it has ended; of the JSON form, a whole call.
    After something that is no call, nothing more comes; `parse_calls` tells what is wrong.

    Attributes:
        text: everything so far.
    """

    def __init__(self, index: int = 0) -> None:
        self.text = ""
        self._index = index - 1  # of the call in work
        self._depth = 0
        self._list = 0  # brackets around the calls: 1, or 0 for a single one
        self._quote = ""
        self._part = ""  # what is not yet certain
        self._names: set[str] = set()
        self._in_call = self._is_escaped = self._is_dead = False

    def add(self, piece: str) -> list[ToolCallDelta]:
        """Takes more text."""
        self.text += piece
        deltas: list[ToolCallDelta] = []
        for character in piece:
            if self._is_dead:
                break
            try:
                deltas += self._take(character)
            except AnswerError:
                self._is_dead = True
        return deltas

    def _take(self, character: str) -> list[ToolCallDelta]:
        if self._quote:
            self._part += character
            if self._is_escaped or character == "\\":
                self._is_escaped = not self._is_escaped
            elif self._part.endswith(self._quote):
                self._quote = ""
            return []
        if character in "\"'":
            self._quote = character * (3 if self._part.endswith(2 * character) else 1)
        elif character in "([{":
            return self._open(character)
        elif character in ")]}":
            return self._close(character)
        elif character == "," and self._depth == self._list + self._in_call:
            if self._in_call:
                return self._argument()
            self._part = ""
            return []
        self._part += character
        return []

    def _open(self, bracket: str) -> list[ToolCallDelta]:
        self._depth += 1
        if bracket == "[" and self._depth == 1 and not self._part.strip():
            self._list = 1
            return []
        if bracket == "(" and self._depth == self._list + 1:
            name, self._part, self._in_call, self._names = self._part.strip(), "", True, set()
            self._index += 1
            return [ToolCallDelta(self._index, name)]
        self._part += bracket
        return []

    def _close(self, bracket: str) -> list[ToolCallDelta]:
        self._depth -= 1
        if self._in_call and self._depth == self._list:
            deltas, self._in_call = self._argument(), False
            end = "}" if self._names else "{}"
            return [*deltas, ToolCallDelta(self._index, arguments=end)]
        self._part += bracket
        if bracket == "}" and not self._in_call and self._depth == self._list:
            [call], self._part = parse_block(self._part), ""
            self._index += 1
            text = json.dumps(call.arguments, ensure_ascii=False)
            return [ToolCallDelta(self._index, call.name, text)]
        return []

    def _argument(self) -> list[ToolCallDelta]:
        part, self._part = self._part, ""
        if not part.strip():
            return []
        [call] = parse_block(f"[f({part})]")
        if self._names & call.arguments.keys():
            raise AnswerError(f"{part:.80} comes twice")
        text = json.dumps(call.arguments, ensure_ascii=False)[1:-1]
        start = ", " if self._names else "{"
        self._names |= call.arguments.keys()
        return [ToolCallDelta(self._index, arguments=start + text)]
