"""`Guide`: keeps an answer to its form, token by token, by llguidance's grammars.

What is not allowed gets no probability. Tokens that have no alternative are not asked for: they go
through the model together with the one before. If there are few tokens left, the answer is brought
to a whole end.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import mlx.core as mx

from ..errors import PromptError
from ..prompts.constraint import Constraint, compiled, refusal
from ..prompts.tokenizer import Lfm2Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_MATCHERS = 64  # of one tokenizer that are kept
RETRY = 8  # tokens until another look for an end that was not found
CHARACTERS = 4  # of a token, more or less
# what ends a JSON document or a call soonest, outside of its strings
ENDS = tuple(b')}],:n" 0123456789-.[{ftNFT')
PRINTABLE = range(32, 127)
SPECIAL = re.compile(rb"\xff(\d+)\xff")  # a special token in bytes that are otherwise UTF-8


class Vocabulary:
    """A tokenizer as llguidance sees it.

    Attributes:
        eos_token_ids: tokens that may end an answer; the first one does if nobody chooses.
        characters: the token of each printable ASCII character.
        special: tokens that are no text.
    """

    def __init__(self, tokenizer: Lfm2Tokenizer, size: int, eos_token_ids: tuple[int, ...]) -> None:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        own = Tokenizer.from_str(tokenizer.tokenizer.to_str())
        # some control tokens are not marked as such; a text may hold none of them
        names = (name for name in own.get_vocab() if name[:2] == "<|" and name[-2:] == "|>")
        own.add_special_tokens(sorted(set(names) - tokenizer.special_tokens.keys()))
        self.tokens: LLTokenizer = LLTokenizer(own.to_str(), size, list(eos_token_ids))
        self.eos_token_ids = eos_token_ids
        self.characters = {code: self.tokens.greedy_tokenize(chr(code))[0] for code in PRINTABLE}
        self.special = {n for n in range(size) if self.tokens.is_special_token(n)}
        self.matchers: dict[Constraint, LLMatcher] = {}

    def matcher(self, constraint: Constraint) -> LLMatcher:
        """A matcher at its beginning.

        Raises:
            PromptError: llguidance refuses the grammar, or finds it too large.
        """
        from llguidance import LLMatcher, LLParserLimits

        if constraint not in self.matchers:
            limits = LLParserLimits(verbose_errors=False)
            made = LLMatcher(self.tokens, compiled(constraint), log_level=0, limits=limits)
            if made.is_error():
                raise refusal(constraint.name, made.get_error())
            if len(self.matchers) == MOST_MATCHERS:
                self.matchers.clear()
            self.matchers[constraint] = made
        return self.matchers[constraint].deep_copy()


Key = tuple[int, tuple[int, ...]]
_vocabularies: WeakKeyDictionary[Lfm2Tokenizer, dict[Key, Future[Vocabulary]]] = WeakKeyDictionary()


def vocabulary(
    tokenizer: Lfm2Tokenizer, size: int, eos_token_ids: tuple[int, ...]
) -> Future[Vocabulary]:
    """The vocabulary of a tokenizer, made once; half a second's work that a thread does.

    Args:
        size: rows of the embedding.
    """
    made = _vocabularies.setdefault(tokenizer, {})
    key = size, eos_token_ids
    if key not in made:
        pool = ThreadPoolExecutor(1, thread_name_prefix="mlx_lfm2vl.guide")
        made[key] = pool.submit(Vocabulary, tokenizer, size, eos_token_ids)
        pool.shutdown(wait=False)
    return made[key]


class Guide:
    """Keeps one answer to its form; a logits processor that is told each token.

    Attributes:
        closing: whether the answer is being brought to its end, without the model.
    """

    needs_token = True

    def __init__(self, constraint: Constraint, known: Future[Vocabulary], max_tokens: int) -> None:
        self.constraint = constraint
        self.max_tokens = max_tokens
        self.known = known
        self.closing = self.is_cut = False
        self.ended = False
        self.begun = False
        self.inside = self.escaped = False  # where the text stands in a string of JSON

    def _begin(self, left: int) -> None:
        self.begun = True
        self.vocabulary = self.known.result()
        self.tokens = self.vocabulary.tokens
        self.matcher = self.vocabulary.matcher(self.constraint)
        self.ending: bytes | None = None  # fits into the tokens that are left
        if self.constraint.close:
            ending = self._search(left)
            self.ending = ending if ending is not None and self._fits(ending, left) else None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """(1, vocab) -> (1, vocab), -inf if a token is not allowed now."""
        if not self.begun:
            self._begin(self.max_tokens)
        mask = self.matcher.compute_bitmask()
        self._check()
        words = mx.array(memoryview(mask).cast("I"))  # type: ignore[arg-type]
        bits = ((words[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).reshape(-1)
        return mx.where(bits[: logits.shape[-1]] != 0, logits, -math.inf)

    @property
    def is_whole(self) -> bool:
        """Whether the answer has all that its form asks for."""
        return not self.is_cut and (self.ended or self.matcher.is_accepting())

    def take(self, token: int, left: int) -> list[int]:
        """The tokens that come now: a chosen one and those it forces.

        If these leave too few for the rest of a document, those that end it come instead.

        Args:
            left: how many tokens may still come, this one included.
        """
        if token in self.vocabulary.eos_token_ids:
            self.ended = True
            return [token]
        if self.matcher.validate_tokens([token]) == 0:
            raise PromptError(
                f"a logits processor has chosen token {token}, which the answer's form forbids"
            )
        self.matcher.consume_token(token)
        coming = [token, *self.matcher.compute_ff_tokens()]
        if len(coming) > 1:
            self.matcher.consume_tokens(coming[1:])
        self._check()
        if self.constraint.close and not self._can_end(coming, left):
            self.closing = True
            coming = self._tokens(self.ending or b"")
        self.is_cut = len(coming) > left
        if self.closing or (self.matcher.is_stopped() and self.matcher.is_accepting()):
            self.ended = True
            coming.append(self.vocabulary.eos_token_ids[0])
        return coming

    def _check(self) -> None:
        if self.matcher.is_error():
            raise refusal(self.constraint.name, self.matcher.get_error())

    def _text(self, tokens: list[int]) -> bytes:
        """The text of tokens, with marks for special ones."""
        special = self.vocabulary.special
        if special.isdisjoint(tokens):
            return self.tokens.decode_bytes(tokens)
        return b"".join(
            b"\xff%d\xff" % token if token in special else self.tokens.decode_bytes([token])
            for token in tokens
        )

    def _tokens(self, text: bytes) -> list[int]:
        """Tokens of such text; they need not be those that the tokenizer would choose."""
        tokens: list[int] = []
        for n, part in enumerate(SPECIAL.split(text)):
            if n % 2:
                tokens.append(int(part))
                continue
            try:
                tokens += self.tokens.greedy_tokenize(part.decode())  # much quicker
            except UnicodeDecodeError:  # it begins inside of a character
                tokens += self.tokens.tokenize_bytes(part)
        return tokens

    def _can_end(self, coming: list[int], left: int) -> bool:
        """Whether what can be ended now, can be ended after these tokens; if so, it learns how."""
        text = self._text(coming)
        self.inside, self.escaped = _follow(text, self.inside, self.escaped)
        ending = self._ending(text, left)
        if ending is not None and not self._fits(ending, left - len(coming)):
            ending = None
        if ending is None and self.ending is not None:
            return False
        self.ending = ending
        return True

    def _ending(self, text: bytes, left: int) -> bytes | None:
        """What makes a whole of the answer, now that this text has come."""
        if self.ending is not None:
            rest = self.ending[len(text) :]
            if self.ending.startswith(text):
                return rest
            for ending in (self.ending, rest):  # as for more text in a string, or for a digit
                tokens = self._tokens(ending)
                if self.matcher.validate_tokens(tokens[:1]) != len(tokens[:1]):
                    continue
                matcher = self.matcher.deep_copy()
                if matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting():
                    return ending
        elif left % RETRY:
            return None  # none was found lately
        return self._search(left)

    def _fits(self, text: bytes, left: int) -> bool:
        return len(text) <= left or (left >= 0 and len(self._tokens(text)) <= left)

    def _search(self, left: int) -> bytes | None:
        """A text that makes a whole of what is there, rather short; None if none is found."""
        matcher, text, seen = self.matcher.deep_copy(), b"", set[bytes]()
        inside, escaped, pause, again, last = self.inside, self.escaped, 0, 0, 0
        for _ in range(CHARACTERS * left):
            if matcher.is_accepting():
                return text
            following = matcher.compute_ff_tokens() or self._end(matcher, inside and not escaped)
            if not following and again and matcher.validate_tokens([last]) == 1:
                again, following = again - 1, [last]
            if not following:
                last, is_new = self._explore(matcher, seen)
                # what repeats itself, as a long string does, is looked at less and less often
                pause = 0 if is_new else 2 * pause + 1
                again, following = pause, [last]
            if not matcher.consume_tokens(following):
                return None
            piece = self._text(following)
            inside, escaped = _follow(piece, inside, escaped)
            text += piece
        return None

    def _end(self, matcher: LLMatcher, inside: bool) -> list[int]:
        """A token that brings a JSON document or a call nearer to its end, if there is one."""
        if self.constraint.kind not in ("json", "tools"):
            return []
        tokens = (self.vocabulary.characters[code] for code in (b'"' if inside else ENDS))
        return next(([token] for token in tokens if matcher.validate_tokens([token]) == 1), [])

    def _explore(self, matcher: LLMatcher, seen: set[bytes]) -> tuple[int, bool]:
        """A token behind which something new is allowed, if there is one; and whether it is."""
        mask = memoryview(matcher.compute_bitmask())
        tokens = self.vocabulary.characters.values()
        allowed = [token for token in tokens if mask[token // 8] >> token % 8 & 1]
        for token in allowed:
            matcher.consume_token(token)
            state = matcher.compute_bitmask()
            matcher.rollback(1)
            if state not in seen:
                seen.add(state)
                return token, True
        if allowed:
            return allowed[0], False
        place = next((place for place, byte in enumerate(mask) if byte), 0)
        return place * 8 + (mask[place] & -mask[place]).bit_length() - 1, True


def _follow(text: bytes, inside: bool, escaped: bool) -> tuple[bool, bool]:
    """Whether JSON text is inside of a string after this, and behind a backslash there."""
    for byte in text:
        if escaped or byte == 255:  # of a special token, with which something new begins
            inside, escaped = inside and byte != 255, False
        elif byte == 34:
            inside = not inside
        else:
            escaped = inside and byte == 92
    return inside, escaped
