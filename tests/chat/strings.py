"""Texts for the tokenizer: made, not stored, the same on every machine and Python."""

import random

COUNT = 300
SPECIAL = [
    "<|startoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
    "<|tool_call_start|>",
    "<image>",
    "<|img_row_1_col_1|>",
    "<|img_row_10_col_10|>",
    "<|img_thumbnail|>",
    "<|image_start|>",
    # almost
    "<|im_end",
    "<|im_<|im_end|>",
    "<|img_row_11_col_1|>",
    "<image >",
    "<IMAGE>",
]
LETTERS = "Straße naïve Ωμέγα Привет שלום مرحبا हिन्दी ไทย 한국어 日本語 中文字 ﬁ Ǆ İ ß ﷽"
WORDS = [
    *("the", "The", "THE", "it's", "I'LL", "don't", "can't", "cat", "sits", "on", "a", "table"),
    *("1", "12", "123", "1234567", "3.14", "x_y", "camelCase", "foo.bar()", "!=", "==", "->"),
    *("python", "Python", "pythonic", "Mathias", "Mathiasson", "[1, 2]", "https://a.b/c?d=e&f"),
    *LETTERS.split(" "),
]
EMOJI = [
    *("\U0001f600", "👍🏽", "❤️", "☺︎", "1️⃣", "🇩🇪🇫🇷"),
    "👩\u200d👩\u200d👧\u200d👦",
    "🏳️\u200d🌈",
    "🧑🏿\u200d🚀",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
]
SPACES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    " \n ",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\x0b",
]
# first and last code points; surrogates lie in none of them
RANGES = {
    "ascii": (0x20, 0x7E),
    "control": (0x00, 0x1F),
    "latin": (0x80, 0x24F),
    "marks": (0x300, 0x36F),
    "greek to arabic": (0x370, 0x6FF),
    "indic": (0x900, 0xDFF),
    "general punctuation": (0x2000, 0x206F),
    "symbols": (0x2190, 0x2BFF),
    "cjk": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "private use": (0xE000, 0xF8FF),
    "presentation forms": (0xF900, 0xFFFC),
    "noncharacters and replacement": (0xFFFD, 0xFFFF),
    "plane 1": (0x10000, 0x1FFFF),
    "plane 2": (0x20000, 0x2FFFF),
    "last planes": (0xE0000, 0x10FFFF),
}


def made_strings() -> list[str]:
    """The texts, in order: empty, runs, one script each, and mixtures of everything."""
    dice = random.Random(20240229)

    def pick(items: list[str]) -> str:
        return items[dice.randrange(len(items))]

    def letter(name: str) -> str:
        first, last = RANGES[name]
        return chr(dice.randrange(first, last + 1))

    def piece() -> str:
        kind = dice.randrange(12)
        if kind == 0:
            return pick(SPECIAL)
        if kind == 1:
            return pick(EMOJI)
        if kind == 2:  # a letter under a heap of marks
            return letter("latin") + "".join(letter("marks") for _ in range(dice.randrange(1, 5)))
        if kind < 7:
            return letter(pick(list(RANGES)))
        return pick(WORDS)

    texts = ["", *SPACES, *SPECIAL, *EMOJI]
    texts += [char * 300 for char in ("a", " ", "\n", "=", "0", "é", "\u0301", "字", "😀", "\x00")]
    for name in RANGES:
        texts += ["".join(letter(name) for _ in range(size)) for size in (1, 7, 40)]
    texts += [" ".join(pick(WORDS) for _ in range(size)) for size in (1, 5, 30, 150)]
    while len(texts) < COUNT:
        glue = [pick(SPACES) if dice.randrange(3) else "" for _ in range(dice.randrange(1, 30))]
        texts.append("".join(piece() + space for space in glue))
    return texts
