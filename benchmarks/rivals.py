"""One side of `compare.py`: runs inside the environment of one rival and answers calls.

    python benchmarks/rivals.py --rival mlx-vlm --model FOLDER

Each line of standard input is a JSON object with `call` and its arguments, each line of standard
output the result. Every rival computes in the checkpoint's own type and decodes greedily.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

SAMPLED_LOGITS = 64  # how many of the vocabulary are compared


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class Mlx:
    """What both MLX rivals share: memory, host time, and steps that begin with a prefill."""

    def __init__(self) -> None:
        import mlx.core as mx

        self.mx = mx
        self.caches: dict[int, tuple[Any, int]] = {}

    def steps(self, ids: Sequence[int], cache: Any, max_tokens: int) -> Iterator[Any]:
        """Yields (token, log-probabilities) through the rival's own `generate_step`."""
        raise NotImplementedError

    def make_cache(self) -> Any:
        raise NotImplementedError

    def features(self) -> Any:
        """Image features of what was seen, lazily."""
        raise NotImplementedError

    def synchronize(self) -> None:
        self.mx.synchronize()

    def vision(self) -> dict[str, Any]:
        """Seconds, and the most memory above what was there before, in bytes."""
        mx = self.mx
        self.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        time_taken = seconds(lambda: mx.eval(self.features()))
        return {"seconds": time_taken, "bytes": mx.get_peak_memory() - before}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        steps = self.steps(ids, self.make_cache(), 1)
        start = time.perf_counter()
        token, logprobs = next(steps)
        time_taken = time.perf_counter() - start
        for _ in steps:
            pass
        self.synchronize()
        return {"seconds": time_taken, "argmax": token, "logits": self.sample(logprobs)}

    def sample(self, logprobs: Any) -> list[float]:
        """Some of the logits, all over the vocabulary, less their mean."""
        values = logprobs.reshape(-1).astype(self.mx.float32)
        values = values - values.mean()
        return values[:: -(-values.size // SAMPLED_LOGITS)].tolist()

    def _filled(self, ids: list[int]) -> tuple[Any, int]:
        """A cache that holds all but the last id, and what was decoded after it; the next token."""
        if len(ids) not in self.caches:
            cache = self.make_cache()
            for _ in self.steps(ids[:-1], cache, 0):
                pass
            self.caches[len(ids)] = cache, ids[-1]
            self.synchronize()
        return self.caches[len(ids)]

    def decode(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """Seconds per token; each call goes on where the last one ended."""
        cache, last = self._filled(ids)
        steps = self.steps([last], cache, tokens + 2)
        # the first tokens may be given out before or after the next ones are under way
        found = [next(steps)[0], next(steps)[0]]
        start = time.perf_counter()
        found += [token for token, _ in steps]
        time_taken = time.perf_counter() - start
        self.caches[len(ids)] = cache, found[-1]
        self.synchronize()
        return {"seconds": time_taken / tokens, "tokens": found}

    def host(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """Seconds from asking for a token until its work is handed over, the device idle."""
        mx, handed = self.mx, []
        original = mx.async_eval

        def watched(*arrays: Any) -> None:
            handed.append(time.perf_counter())
            original(*arrays)

        steps = self.steps(ids, self.make_cache(), tokens + 3)
        next(steps)
        next(steps)
        times = []
        mx.async_eval = watched
        for _ in range(tokens):
            self.synchronize()
            handed.clear()
            start = time.perf_counter()
            next(steps)
            times.append(handed[0] - start)
        mx.async_eval = original
        for _ in steps:
            pass
        self.synchronize()
        return {"seconds": sorted(times)[len(times) // 2]}


class Ours(Mlx):
    """This package."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        from pathlib import Path

        import mlx_lfm2vl
        from mlx_lfm2vl.models.config import load_config

        dtype = load_config(Path(folder)).dtype
        self.model, self.processor = mlx_lfm2vl.load(folder, dtype=dtype, lazy=False)

    def versions(self) -> str:
        import mlx_lfm2vl

        return f"{mlx_lfm2vl.__version__}, mlx {version('mlx')}"

    def make_cache(self) -> Any:
        return self.model.make_cache()

    def steps(self, ids: Sequence[int], cache: Any, max_tokens: int) -> Iterator[Any]:
        from mlx_lfm2vl.generation.generate import generate_step

        return generate_step(ids, self.model, max_tokens=max_tokens, prompt_cache=cache)

    def see(self, image: str, question: str) -> dict[str, Any]:
        self.prompt = self.processor(question, image)
        return {"ids": self.prompt.token_ids, "views": len(self.prompt.spatial_shapes)}

    def preprocess(self, image: str, question: str) -> dict[str, Any]:
        return {"seconds": seconds(lambda: self.see(image, question))}

    def features(self) -> Any:
        return self.model.encode_images(self.prompt.pixel_values, self.prompt.spatial_shapes)

    def logits(self) -> dict[str, Any]:
        """First token of what was seen."""
        ids = self.mx.array([self.prompt.token_ids])
        out = self.model(ids, image_features=self.features(), logits_to_keep=1)
        return {"argmax": out.logits.argmax().item(), "logits": self.sample(out.logits)}

    def ask(self, image: str, questions: list[str]) -> dict[str, Any]:
        """Seconds to the first token of each question about one image."""
        from mlx_lfm2vl import Sampling, Session

        session = Session(self.model, self.processor)
        times, tokens = [], []
        for number, question in enumerate(questions):
            start = time.perf_counter()
            if number == 0:
                session.see(image)
            stream = session.stream_ask(question, max_tokens=2, sampling=Sampling(temperature=0))
            tokens.append(next(stream).token)
            times.append(time.perf_counter() - start)
            for _ in stream:
                pass
        return {"times": times, "tokens": tokens}

    def bandwidth(self, rounds: int) -> float:
        """Bytes per second of a matrix-vector product."""
        from mlx_lfm2vl.measuring.machine import measure_bandwidth

        return measure_bandwidth(self.model.vision_tower.post_layernorm.weight.dtype, rounds)

    def token_bytes(self, positions: int) -> int:
        """Weights and cache that a token reads."""
        from mlx_lfm2vl.measuring.stages import decode_weight_bytes
        from mlx_lfm2vl.models.cache import cache_nbytes, copy_cache

        cache, _ = self.caches[positions]
        return decode_weight_bytes(self.model.language_model) + cache_nbytes(copy_cache(cache))


class MlxVlm(Mlx):
    """mlx-vlm, with its cache of image features where it asks again."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        from mlx_vlm import load

        self.model, self.processor = load(folder)

    def versions(self) -> str:
        return ", ".join(f"{name} {version(name)}" for name in ("mlx-vlm", "mlx", "transformers"))

    def synchronize(self) -> None:
        from mlx_vlm.generate import generation_stream

        self.mx.synchronize()
        self.mx.synchronize(generation_stream)

    def make_cache(self) -> Any:
        from mlx_vlm.models.cache import make_prompt_cache

        return make_prompt_cache(self.model.language_model)

    def steps(self, ids: Sequence[int], cache: Any, max_tokens: int) -> Iterator[Any]:
        from mlx_vlm.generate import generate_step

        tokens = self.mx.array([list(ids)])
        return generate_step(
            tokens, self.model, None, None, max_tokens=max_tokens, temperature=0, prompt_cache=cache
        )

    def _prompt(self, question: str) -> str:
        from mlx_vlm import apply_chat_template

        return apply_chat_template(self.processor, self.model.config, question, num_images=1)

    def see(self, image: str, question: str) -> dict[str, Any]:
        from mlx_vlm import prepare_inputs

        inputs = prepare_inputs(
            self.processor,
            images=[image],
            prompts=self._prompt(question),
            image_token_index=self.model.config.image_token_index,
        )
        self.ids = inputs["input_ids"]
        self.pixels = inputs["pixel_values"]
        names = ("spatial_shapes", "pixel_attention_mask")
        self.shapes = {name: inputs[name] for name in names}
        self.mx.eval(self.ids, self.pixels, list(self.shapes.values()))
        return {"ids": self.ids[0].tolist(), "views": len(self.shapes["spatial_shapes"])}

    def preprocess(self, image: str, question: str) -> dict[str, Any]:
        return {"seconds": seconds(lambda: self.see(image, question))}

    def features(self) -> Any:
        return self.model.encode_images(self.pixels, **self.shapes)

    def logits(self) -> dict[str, Any]:
        found = self.model.get_input_embeddings(self.ids, self.pixels, **self.shapes)
        out = self.model.language_model(self.ids, inputs_embeds=found.inputs_embeds)
        last = out.logits[0, -1]
        return {"argmax": last.argmax().item(), "logits": self.sample(last)}

    def ask(self, image: str, questions: list[str]) -> dict[str, Any]:
        from mlx_vlm import VisionFeatureCache, stream_generate

        # its caches of prompts cannot help: none ends where the question begins
        cache = VisionFeatureCache()
        times, tokens = [], []
        for question in questions:
            start = time.perf_counter()
            stream = stream_generate(
                self.model,
                self.processor,
                self._prompt(question),
                image=[image],
                max_tokens=2,
                temperature=0,
                vision_cache=cache,
            )
            tokens.append(next(stream).token)
            times.append(time.perf_counter() - start)
            for _ in stream:
                pass
        return {"times": times, "tokens": tokens}


class Transformers:
    """The official implementation on PyTorch."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoProcessor, Lfm2VlForConditionalGeneration, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.torch = torch
        torch.set_grad_enabled(False)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = Lfm2VlForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
        self.caches: dict[int, tuple[Any, int]] = {}

    def versions(self) -> str:
        return ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))

    def see(self, image: str, question: str) -> dict[str, Any]:
        from PIL import Image

        # torchvision's own decoder is not in every build
        picture = Image.open(image).convert("RGB")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        self.inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        views = len(self.inputs["spatial_shapes"])
        return {"ids": self.inputs["input_ids"][0].tolist(), "views": views}

    def preprocess(self, image: str, question: str) -> dict[str, Any]:
        return {"seconds": seconds(lambda: self.see(image, question))}

    def vision(self) -> dict[str, Any]:
        names = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
        inputs = {name: self.inputs[name] for name in names}
        return {"seconds": seconds(lambda: self.model.get_image_features(**inputs))}

    def logits(self) -> dict[str, Any]:
        out = self.model(**self.inputs, logits_to_keep=1)
        return {"argmax": out.logits.argmax().item(), "logits": self._sample(out.logits)}

    def _sample(self, logits: Any) -> list[float]:
        values = logits.reshape(-1).float()
        values = values - values.mean()
        return values[:: -(-values.numel() // SAMPLED_LOGITS)].tolist()

    def _forward(self, ids: Sequence[int], cache: Any) -> Any:
        tokens = self.torch.tensor([list(ids)])
        return self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        start = time.perf_counter()
        out = self._forward(ids, None)
        token = out.logits.argmax().item()
        time_taken = time.perf_counter() - start
        return {"seconds": time_taken, "argmax": token, "logits": self._sample(out.logits)}

    def decode(self, ids: list[int], tokens: int) -> dict[str, Any]:
        if len(ids) not in self.caches:
            self.caches[len(ids)] = self._forward(ids[:-1], None).past_key_values, ids[-1]
        cache, last = self.caches[len(ids)]
        found = [last]
        for _ in range(2):
            found.append(self._forward([found[-1]], cache).logits.argmax().item())
        del found[0]
        start = time.perf_counter()
        for _ in range(tokens):
            found.append(self._forward([found[-1]], cache).logits.argmax().item())
        time_taken = time.perf_counter() - start
        self.caches[len(ids)] = cache, found[-1]
        return {"seconds": time_taken / tokens, "tokens": found}

    def ask(self, image: str, questions: list[str]) -> dict[str, Any]:
        times, tokens = [], []
        for question in questions:
            start = time.perf_counter()
            tokens.append(self.answer(image, question, 1)[0])
            times.append(time.perf_counter() - start)
        return {"times": times, "tokens": tokens}

    def answer(self, image: str, question: str, max_tokens: int) -> list[int]:
        self.see(image, question)
        out = self.model.generate(**self.inputs, max_new_tokens=max_tokens, do_sample=False)
        return out[0, self.inputs["input_ids"].shape[1] :].tolist()


RIVALS = {"mlx_lfm2vl": Ours, "mlx-vlm": MlxVlm, "transformers": Transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rival", required=True, choices=RIVALS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--import", dest="module", help="module to import before anything else")
    parser.add_argument(
        "--answer",
        nargs=3,
        metavar=("IMAGE", "QUESTION", "TOKENS"),
        help="answer once and end, for transformers, which has no command line",
    )
    args = parser.parse_args()
    # libraries may print; only results go where the caller reads
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if args.module is not None:
        importlib.import_module(args.module)
    rival: Any = RIVALS[args.rival](args.model)
    if args.answer is not None:
        image, question, count = args.answer
        rival.answer(image, question, int(count))
        return
    for line in sys.stdin:
        arguments = json.loads(line)
        result = getattr(rival, arguments.pop("call"))(**arguments)
        results.write(json.dumps(result) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
