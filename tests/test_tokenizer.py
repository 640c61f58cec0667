"""Text to ids and back, against the ids that `transformers` gives, and decoding as tokens come."""

import json
from pathlib import Path

import pytest

from mlx_lfm2vl.prompts.tokenizer import Lfm2Tokenizer

from .chat.strings import COUNT, SPECIAL, made_strings
from .helpers import FIXTURES, PUBLISHED

NAMES = ["LFM2-VL-450M", "LFM2.5-VL-450M", "LFM2.5-VL-1.6B"]
IDS = json.loads((Path(__file__).parent / "chat" / "token_ids.json").read_text("utf-8"))
STRINGS = made_strings()
LOST = "\ufffd"


WHOLE = [PUBLISHED / name for name in NAMES] if PUBLISHED.exists() else []
# the small checkpoint's vocabulary is always here
FOLDERS = [FIXTURES / "first", *WHOLE]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def tokenizer(request) -> Lfm2Tokenizer:
    return Lfm2Tokenizer.from_folder(request.param)


def segments(tokenizer: Lfm2Tokenizer, ids: list[int], skip_special_tokens: bool) -> list[str]:
    stream = tokenizer.detokenizer(skip_special_tokens)
    pieces = []
    for token_id in ids:
        stream.add_token(token_id)
        pieces.append(stream.last_segment)
    stream.finalize()
    return [*pieces, stream.last_segment]


def test_there_are_as_many_ids_as_strings():
    assert len(IDS) == len(STRINGS) == COUNT


@pytest.mark.skipif(not WHOLE, reason="needs ../shared/checkpoints")
def test_encoding_equals_transformers():
    for folder in WHOLE:
        tokenizer = Lfm2Tokenizer.from_folder(folder)
        for text, expected in zip(STRINGS, IDS, strict=True):
            assert tokenizer.encode(text) == expected["ids"], (folder.name, text)
            plain = expected.get("plain", expected["ids"])
            assert tokenizer.encode_plain(text) == plain, (folder.name, text)


def test_decoding_gives_the_text_back(tokenizer):
    for text in STRINGS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        # what was written as plain characters is no special token to skip
        plain = tokenizer.encode_plain(text)
        assert tokenizer.decode(plain, skip_special_tokens=True) == text
    assert tokenizer.batch_decode([tokenizer.encode(text) for text in STRINGS]) == STRINGS


def test_special_tokens_are_skipped_on_demand(tokenizer):
    ids = tokenizer.encode("a<|im_end|> b<image>", add_special_tokens=True)
    assert tokenizer.decode(ids) == "<|startoftext|>a<|im_end|> b<image>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"
    assert tokenizer.batch_decode([ids, []], skip_special_tokens=True) == ["a b", ""]


def test_special_tokens_are_one_id(tokenizer):
    for name, token_id in tokenizer.special_tokens.items():
        assert tokenizer.encode(name) == [token_id]
        assert token_id not in tokenizer.encode_plain(name)


@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_streaming_equals_decoding(tokenizer, skip_special_tokens):
    for text in STRINGS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids, skip_special_tokens)
        pieces = segments(tokenizer, ids, skip_special_tokens)
        shown = ""
        for piece in pieces:
            assert LOST not in piece or LOST in whole, repr(text)
            shown += piece
            assert whole.startswith(shown), repr(text)
        assert shown == whole


def test_streaming_of_broken_characters_equals_decoding(tokenizer):
    # as a model may write: characters begun and not ended, ends without a beginning
    parts = [tokenizer.encode(text) for text in ("😀", "字", "𠜎", "ก", " x", "\n", "<|im_end|>")]
    for first in parts:
        for second in parts:
            ids = [*first[:-1], *second[1:], *second, *first[:1]]
            whole = tokenizer.decode(ids)
            pieces = segments(tokenizer, ids, skip_special_tokens=False)
            assert "".join(pieces) == whole
            shown = ["".join(pieces[:n]) for n in range(len(pieces))]
            assert all(whole.startswith(text) for text in shown)


def test_streaming_shows_letters_at_once(tokenizer):
    ids = tokenizer.encode("The cat sits on the table. " * 40)
    pieces = segments(tokenizer, ids, skip_special_tokens=True)
    assert all(pieces[:-1])
    assert pieces[-1] == ""


def test_streaming_goes_on_after_long_runs_of_broken_characters(tokenizer):
    half = tokenizer.encode("😀")[:1]
    ids = [*half * 200, *tokenizer.encode("Hello")]
    whole = tokenizer.decode(ids)
    assert "".join(segments(tokenizer, ids, skip_special_tokens=True)) == whole


def test_ids_without_a_token_decode_to_nothing(tokenizer):
    # the embedding has more rows than the vocabulary, so a model may pick one
    unknown = 65_535
    assert tokenizer.decode([unknown]) == ""
    ids = tokenizer.encode("Hi")
    assert "".join(segments(tokenizer, [*ids, unknown, *ids], True)) == "HiHi"


def test_names_of_special_tokens_survive_as_plain_text(tokenizer):
    for name in SPECIAL:
        ids = tokenizer.encode_plain(f"a {name} b")
        assert not set(ids) & set(tokenizer.special_tokens.values()), name
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"a {name} b"
