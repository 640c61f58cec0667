"""How well seconds are estimated: ten questions of different size, asked twice.

    python benchmarks/estimates.py --model LiquidAI/LFM2.5-VL-450M

The first round teaches; in the second each question is estimated before it is asked. Answers have
exactly `max_tokens` tokens, so that estimate and measurement are of the same work.
"""

import argparse
import tempfile
from pathlib import Path

from mlx_lfm2vl import ImageOptions, Question, Usage, estimate, load, read_speeds, remember
from mlx_lfm2vl.generation.answer import eos_token_ids
from mlx_lfm2vl.generation.engine import Engine
from mlx_lfm2vl.generation.generate import run
from mlx_lfm2vl.measuring.stages import made_picture

WORDS = "The lighthouse keeper climbed the stairs and wrote down the wind and the ships. "
# sides of pictures, words, tokens of the answer
QUESTIONS = (
    ([], 5, 32),
    ([(256, 256)], 5, 16),
    ([(512, 384)], 20, 64),
    ([(640, 480)], 5, 128),
    ([(1024, 768)], 5, 32),
    ([(1600, 1200)], 40, 48),
    ([(400, 1200)], 5, 24),
    ([(512, 512), (512, 512)], 5, 96),
    ([(640, 480)] * 4, 5, 32),
    ([], 800, 64),
)


def question(sides, words, tokens, processor, scale):
    text = "What is it? " + (WORDS * (words // 14 + 1))[: words * 6]
    ends = dict.fromkeys(eos_token_ids(processor), -1000.0)
    images = [made_picture(*side) for side in sides]
    return Question(
        text, images or None, max_tokens=max(2, round(tokens * scale)), temperature=0,
        logit_bias=ends, measure_vision=True, image_options=ImageOptions(),
    )  # fmt: skip


def ask(model, processor, asked):
    engine = Engine(model, processor)
    row = engine.add(asked)
    for _ in run(engine, row):
        pass
    return Usage.of(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="LiquidAI/LFM2.5-VL-450M")
    parser.add_argument("--dtype")
    parser.add_argument("--scale", type=float, default=1.0, help="of the answers' lengths")
    args = parser.parse_args()
    model, processor = load(args.model, dtype=args.dtype, lazy=False)
    questions = [question(*about, processor, args.scale) for about in QUESTIONS]
    ask(model, processor, questions[1])  # what is compiled and traced once
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.json"
        for asked in questions:
            remember(model, [ask(model, processor, asked)], path=path)
        print(f"{'prompt':>7} {'patches':>8} {'tokens':>7} {'estimated':>10} {'measured':>9} error")
        for asked in questions:
            speeds = read_speeds(model, path)
            found = estimate(model, processor, asked, speeds=speeds)
            usage = ask(model, processor, asked)
            measured = usage.prompt_time + usage.answer_time
            error = found.seconds / measured - 1
            good += abs(error) <= 0.25
            stages = (
                (found.seconds_vision, usage.vision_time or 0.0),
                (found.seconds_prefill, usage.prompt_time - (usage.vision_time or 0.0)),
                (found.seconds_decode, usage.answer_time),
            )
            details = ", ".join(f"{one:.3f}/{other:.3f}" for one, other in stages)
            print(
                f"{found.prompt_tokens:7} {found.patches:8} {usage.generation_tokens:7} "
                f"{found.seconds:10.3f} {measured:9.3f} {error:+.0%} ({details})"
            )
            remember(model, [usage], path=path)
    print(f"{good} of {len(questions)} within 25 %")


if __name__ == "__main__":
    main()
