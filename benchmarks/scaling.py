"""How cost grows: vision with views, prefill with length, decoding with its cache, and batches.

    python benchmarks/scaling.py --model FOLDER --csv scaling.csv --plot scaling.png

Medians of several rounds after one that does not count. Caches of decoding are filled with zeros:
what a token costs does not depend on what it sees.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx

from mlx_lfm2vl import CacheOptions, load
from mlx_lfm2vl.generation.engine import prefill
from mlx_lfm2vl.generation.generate import generate_step
from mlx_lfm2vl.measuring.machine import repeat, seconds, this_machine
from mlx_lfm2vl.models.cache import BatchKVCache, Cache, ConvCache, KVCache
from mlx_lfm2vl.models.lfm2_vl import Lfm2VlForConditionalGeneration

VIEWS = (1, 2, 3, 4, 6, 8, 10)
PREFILL_LENGTHS = (64, 128, 256, 512, 1024, 2048)
CACHE_LENGTHS = (64, 256, 1024, 2048, 4096, 8192)
BATCH_SIZES = (1, 2, 4, 8, 16)
BATCH_POSITIONS = 256  # of each row
FILL_STEP = 256  # positions
PATCH_VALUES = 3 * 16**2


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        measure: which curve: vision, prefill, decode, decode_rotating or batch.
        x: views, positions or rows.
        seconds: median; of decoding per token, of a batch per step of all rows.
        bytes: most memory above what was there before.
    """

    measure: str
    x: int
    seconds: float
    bytes: int


class Scaling:
    """A model, and one method per curve."""

    def __init__(self, model: Lfm2VlForConditionalGeneration, args: argparse.Namespace) -> None:
        self.model = model
        self.language_model = model.language_model
        self.rounds = args.rounds
        self.tokens = args.tokens
        self.window = args.window
        text = model.config.text_config
        self.kv_shape = (text.num_key_value_heads, text.head_dim)
        self.hidden = text.hidden_size
        self.dtype = self.language_model.model.embedding_norm.weight.dtype
        self.side = model.image_config.tile_size // model.image_config.encoder_patch_size

    def point(self, measure: str, x: int, action: Callable[[], float]) -> Point:
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        times = repeat(self.rounds, action)
        found = Point(measure, x, statistics.median(times), mx.get_peak_memory() - before)
        print(
            f"{measure:16} {x:6} {found.seconds:10.4f} s {found.bytes / 1e6:10.1f} MB", flush=True
        )
        return found

    def vision(self) -> Iterator[Point]:
        """Tiles of full size."""
        for views in VIEWS:
            shapes = [(self.side, self.side)] * views
            pixels = mx.zeros((views * self.side**2, PATCH_VALUES), mx.uint8)
            mx.eval(pixels)

            def encode(pixels: mx.array = pixels, shapes: list = shapes) -> mx.array:
                return self.model.encode_images(pixels, shapes)

            yield self.point("vision", views, lambda encode=encode: seconds(encode))

    def prefill(self) -> Iterator[Point]:
        """A prompt into an empty cache, until its last logits are known."""
        for length in PREFILL_LENGTHS:
            embeddings = mx.zeros((length, self.hidden), self.dtype)
            mx.eval(embeddings)

            def read(embeddings: mx.array = embeddings) -> list[mx.array]:
                cache = self.model.make_cache()
                *_, hidden = prefill(self.language_model, embeddings, cache)
                logits = self.language_model.logits(hidden[:, -1])
                return [logits, *(array for entry in cache for array in entry.arrays)]

            yield self.point("prefill", length, lambda read=read: seconds(read))

    def decode(self) -> Iterator[Point]:
        """Tokens behind a cache that keeps everything."""
        yield from self._decode("decode", CacheOptions())

    def decode_rotating(self) -> Iterator[Point]:
        """The same with a sliding window: flat from its size on."""
        yield from self._decode(
            "decode_rotating", CacheOptions(max_kv_size=self.window, keep=self.window // 4)
        )

    def _decode(self, name: str, options: CacheOptions) -> Iterator[Point]:
        for length in CACHE_LENGTHS:

            def decode(length: int = length) -> float:
                cache = self.filled(length, options)
                mx.reset_peak_memory()  # filling does not count
                steps = generate_step(
                    [0],
                    self.model,
                    max_tokens=self.tokens + 1,
                    prompt_cache=cache,
                    cache_options=options,
                )
                next(steps)
                start = time.perf_counter()
                count = sum(1 for _ in steps)
                return (time.perf_counter() - start) / count

            yield self.point(name, length, decode)

    def filled(self, length: int, options: CacheOptions) -> list[Cache]:
        """A cache that has seen so many positions of zeros."""
        cache = self.model.make_cache(options)
        heads, dim = self.kv_shape
        for start in range(0, length, FILL_STEP):
            zeros = mx.zeros((1, heads, min(FILL_STEP, length - start), dim), self.dtype)
            for entry in cache:
                if not isinstance(entry, ConvCache):
                    entry.update_and_fetch(zeros, zeros)
            mx.eval([entry.state for entry in cache])
        return cache

    def batch(self) -> Iterator[Point]:
        """Rows that decode together, each with a prompt of its own."""
        for rows in BATCH_SIZES:

            def decode(rows: int = rows) -> float:
                singles = [self.filled(BATCH_POSITIONS, CacheOptions()) for _ in range(rows)]
                cache = [
                    BatchKVCache(layer) if isinstance(layer[0], KVCache) else ConvCache()
                    for layer in zip(*singles, strict=True)
                ]
                y = mx.zeros((rows, 1), mx.int32)
                mx.eval(y, [entry.state for entry in cache])
                del singles
                mx.reset_peak_memory()
                start = time.perf_counter()
                for _ in range(self.tokens):
                    logits = self.language_model(y, cache)
                    y = mx.argmax(logits, axis=-1)
                    mx.async_eval(y)
                mx.eval(y)
                return (time.perf_counter() - start) / self.tokens

            yield self.point("batch", rows, decode)


CURVES: dict[str, Callable[[Scaling], Iterator[Point]]] = {
    "vision": Scaling.vision,
    "prefill": Scaling.prefill,
    "decode": Scaling.decode,
    "decode_rotating": Scaling.decode_rotating,
    "batch": Scaling.batch,
}


def write_csv(points: list[Point], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def plot(points: list[Point], path: Path) -> None:
    """Four panels as a PNG; needs the extra `plot`."""
    from matplotlib.figure import Figure

    curves: dict[str, list[Point]] = {}
    for point in points:
        curves.setdefault(point.measure, []).append(point)
    figure = Figure(figsize=(11, 8), layout="constrained")
    (vision, prefill), (decode, batch) = figure.subplots(2, 2)
    memory = vision.twinx()
    for axes, name, scale, label in (
        (vision, "vision", 1, "seconds"),
        (prefill, "prefill", 1, "seconds"),
        (decode, "decode", 1e3, "every position kept"),
        (decode, "decode_rotating", 1e3, "sliding window"),
    ):
        found = curves.get(name, [])
        axes.plot([p.x for p in found], [scale * p.seconds for p in found], "o-", label=label)
    found = curves.get("vision", [])
    memory.plot([p.x for p in found], [p.bytes / 1e6 for p in found], "s--", color="tab:grey")
    memory.set(ylabel="memory above the weights (MB, dashed)", ylim=(0, None))
    found = curves.get("batch", [])
    batch.plot([p.x for p in found], [p.x / p.seconds for p in found], "o-")
    vision.set(title="Vision", xlabel="views", ylabel="s", ylim=(0, None))
    prefill.set(title="Prefill", xlabel="positions", ylabel="s", ylim=(0, None))
    decode.set(title="Decode", xlabel="positions in the cache", ylabel="ms per token")
    decode.set(ylim=(0, None))
    decode.legend()
    batch.set(title="Batch", xlabel="rows", ylabel="tokens per second", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype")
    parser.add_argument(
        "--curves", default=",".join(CURVES), help="which, with commas (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="decoded each time")
    parser.add_argument("--window", type=int, default=1024, help="positions a rotating cache keeps")
    parser.add_argument("--csv", type=Path, help="file for the numbers")
    parser.add_argument("--plot", type=Path, help="file for the picture, a PNG")
    args = parser.parse_args()
    names = args.curves.split(",")
    unknown = set(names) - set(CURVES)
    if unknown:
        parser.error(f"--curves knows {', '.join(CURVES)}, not {', '.join(sorted(unknown))}")
    if args.plot is not None and find_spec("matplotlib") is None:
        parser.error('--plot needs matplotlib: pip install "mlx-lfm2vl[plot]"')
    machine = this_machine()
    print(f"{machine.system}: {machine.device_name}, {machine.cores} cores, on {machine.device}")
    print(f"mlx_lfm2vl {machine.mlx_lfm2vl}, mlx {machine.mlx}, {args.model}")
    model, _ = load(args.model, dtype=args.dtype, lazy=False)
    scaling = Scaling(model, args)
    points = [point for name in names for point in CURVES[name](scaling)]
    if args.csv is not None:
        write_csv(points, args.csv)
    if args.plot is not None:
        plot(points, args.plot)


if __name__ == "__main__":
    main()
