"""What a form costs and saves: time per step and per document, and whether all answers are valid.

    python benchmarks/guided.py --model FOLDER
    python benchmarks/guided.py --valid 25

The first prints the time of a guided step beside an unguided one (without forced tokens, in a long
string), and that of a whole invoice. `--rival`, in mlx-vlm's environment, measures its guided
invoice; its mask is a Metal kernel, so on other machines plain operations take its place. The
second asks the demo model for each of 20 schemas so many times at temperature 3.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

TEXT = {"type": "string", "maxLength": 20}
WHOLE = {"type": "integer", "minimum": 0, "maximum": 999}
LINE = {"description": TEXT, "quantity": WHOLE, "unit_price": WHOLE}


def record(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


LINES = {"type": "array", "items": record(LINE), "minItems": 3, "maxItems": 3}
CURRENCY = {"enum": ["EUR", "USD"]}
INVOICE = record({"vendor": TEXT, "currency": CURRENCY, "lines": LINES, "total": WHOLE})
CLOCK = time.perf_counter  # --cpu: time.process_time, for a machine that others use, too
PROMPT = "Write the invoice."


def median_of(rounds: int, measure: Callable[[], float]) -> float:
    """The median of several measurements, after one that does not count."""
    measure()
    return statistics.median(measure() for _ in range(rounds))


def ours(args: argparse.Namespace) -> dict[str, float]:
    from mlx_lfm2vl import load, stream_generate

    parts = load(args.model, lazy=False)
    found: dict[str, float] = {}

    def step(**settings: Any) -> float:
        """Seconds of the host per token, from the second one on; other threads do not count."""
        stamps = [
            time.thread_time()
            for _ in stream_generate(*parts, PROMPT, max_tokens=args.tokens, **settings)
        ]
        return (stamps[-1] - stamps[1]) / (len(stamps) - 2)

    def document() -> float:
        start = CLOCK()
        responses = list(
            stream_generate(*parts, PROMPT, schema=INVOICE, temperature=0, max_tokens=1000)
        )
        json.loads("".join(response.text for response in responses))
        found["tokens of a document"] = len(responses)
        return CLOCK() - start

    endless = never_ends(parts[1], parts[0].config.text_config.vocab_size)
    plain = {"logits_processors": [endless], "temperature": 0.7, "seed": 1}
    guided = {**plain, "schema": {"type": "string"}}
    rounds = [(step(**plain), step(**guided, close=False), step(**guided))
              for _ in range(args.rounds + 1)][1:]  # fmt: skip
    names = ("unguided step", "guided step", "guided step that can close")
    for name, times in zip(names, zip(*rounds, strict=True), strict=True):
        found[name] = statistics.median(times)
    if not args.steps:
        found["document"] = median_of(args.rounds, document)
    return found


def never_ends(processor: Any, size: int) -> Callable[[Any, Any], Any]:
    """A logits processor that lets neither an answer nor a string end, so that all are as long."""
    import mlx.core as mx

    tokenizer = processor.tokenizer
    ends = {tokenizer.eos_token_id}
    ends |= {token for token in range(size) if '"' in tokenizer.decode([token])}
    allowed = mx.array([token not in ends for token in range(size)])
    mx.eval(allowed)

    def process(tokens: Any, logits: Any) -> Any:
        kept = mx.where(allowed, logits, -mx.inf)
        return mx.where(mx.isinf(kept).all(), logits, kept)  # the quote that opens a string

    return process


def rival(args: argparse.Namespace) -> dict[str, float]:
    import mlx.core as mx
    from mlx_vlm import load, stream_generate, structured

    if not mx.metal.is_available():

        def plain(logits: Any, mask: Any) -> Any:
            bits = ((mask.reshape(-1)[:, None] >> mx.arange(32)) & 1).reshape(-1)
            bits = mx.pad(bits, (0, max(0, logits.shape[-1] - bits.size)))
            return mx.where(bits[: logits.shape[-1]] != 0, logits, -mx.inf)

        structured._apply_llguidance_mask = plain
    model, processor = load(args.model)
    tokenizer = processor.tokenizer
    messages = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    found: dict[str, float] = {}

    def document() -> float:
        start = CLOCK()
        guide = structured.build_json_schema_logits_processor(tokenizer, INVOICE)
        settings = {"logits_processors": [guide], "temperature": 0.0, "max_tokens": 1000}
        responses = list(stream_generate(model, processor, prompt, **settings))
        json.loads("".join(response.text for response in responses))
        found["tokens of a document"] = responses[-1].generation_tokens
        return CLOCK() - start

    found["document"] = median_of(args.rounds, document)
    return found


def count_valid(times: int) -> None:
    from jsonschema import Draft202012Validator

    from mlx_lfm2vl import load, stream_generate

    parts = load("demo", dtype="float32")
    path = Path(__file__).parents[1] / "tests/checkpoints/schemas.json"
    good = total = 0
    for name, schema in json.loads(path.read_text(encoding="utf-8")).items():
        judge = Draft202012Validator(json.loads(json.dumps(schema), parse_float=Decimal))
        valid = closed = 0
        for seed in range(times):
            responses = list(
                stream_generate(
                    *parts, "What is it?", schema=schema, seed=seed, temperature=3.0, top_p=1.0,
                    max_tokens=(256, 160, 200)[seed % 3],
                )
            )  # fmt: skip
            text = "".join(response.text for response in responses)
            last = responses[-1]
            ends = last.finish_reason == "stop" or last.closed
            valid += ends and judge.is_valid(json.loads(text, parse_float=Decimal))
            closed += last.closed
        print(f"{name}: {valid} of {times} valid, {closed} of them closed at the limit")
        good, total = good + valid, total + times
    print(f"{good} of {total} valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a checkpoint")
    parser.add_argument("--rival", action="store_true", help="measure mlx-vlm")
    parser.add_argument("--tokens", type=int, default=100, help="of a measured string")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", action="store_true", help="measure steps alone")
    parser.add_argument("--valid", type=int, help="answers per schema")
    parser.add_argument("--cpu", action="store_true", help="documents in CPU time, not wall time")
    args = parser.parse_args()
    if args.cpu:
        global CLOCK
        CLOCK = time.process_time
    if args.valid:
        count_valid(args.valid)
        return
    print(platform.platform())
    for name, value in (rival(args) if args.rival else ours(args)).items():
        print(f"{name}: {value:.0f}" if "tokens" in name else f"{name}: {value * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
