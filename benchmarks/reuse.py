"""What is gained by reuse: a second question about an image, and rows that decode together.

    python benchmarks/reuse.py --model FOLDER --image examples/photos/rocket.jpg

Prints medians of several rounds. On a CPU, float32 and a fast BLAS are needed for sensible times.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from mlx_lfm2vl import (
    Question,
    Sampling,
    Session,
    __version__,
    batch_generate,
    load,
)

GREEDY = Sampling(temperature=0)
QUESTIONS = ("What is in this image?", "What colours do you see?", "Is it day or night?")


def median_of(rounds: int, measure: Callable[[], float]) -> float:
    """The median of several measurements in seconds, after one that does not count."""
    measure()
    return statistics.median(measure() for _ in range(rounds))


def first_token(session: Session, question: str) -> float:
    """Seconds from question to first token."""
    start = time.perf_counter()
    stream = session.stream_ask(question, sampling=GREEDY, max_tokens=2)
    next(stream)
    seconds = time.perf_counter() - start
    stream.close()
    return seconds


def questions(model, processor, image: str, rounds: int) -> None:
    """Time to first token: seeing and asking, then asking again."""

    def fresh() -> float:
        start = time.perf_counter()
        session = Session(model, processor)
        session.see(image)
        return time.perf_counter() - start + first_token(session, QUESTIONS[0])

    session = Session(model, processor)
    session.see(image)
    first = median_of(rounds, fresh)
    again = median_of(rounds, lambda: first_token(session, QUESTIONS[1]))
    print(f"first question, image included: {first:8.3f} s to the first token")
    print(f"second question:                {again:8.3f} s, 1/{first / again:.0f} of the first")


def rows(model, processor, count: int, tokens: int, rounds: int) -> None:
    """Tokens per second of rows together and one by one, prompts included."""
    requests = [Question(QUESTIONS[n % 3] + " " * n, None, tokens, GREEDY) for n in range(count)]

    def run(size: int) -> float:
        start = time.perf_counter()
        batch_generate(model, processor, requests, batch_size=size)
        return time.perf_counter() - start

    single, together = (median_of(rounds, lambda size=size: run(size)) for size in (1, count))
    speed = count * tokens
    print(f"{count} rows one by one:  {speed / single:8.1f} tok/s")
    print(f"{count} rows together:    {speed / together:8.1f} tok/s, {single / together:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="per row")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"mlx_lfm2vl {__version__}, mlx {mx.__version__}, {mx.default_device()}")
    print(f"{platform.platform()}, {platform.processor() or platform.machine()}")
    model, processor = load(args.model, dtype=args.dtype, lazy=False)
    questions(model, processor, args.image, args.rounds)
    rows(model, processor, args.rows, args.tokens, args.rounds)


if __name__ == "__main__":
    main()
