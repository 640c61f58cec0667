"""Fine-tuning: one loss, one step, and a run that can be stopped and resumed exactly."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..checkpoints.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FINE_TUNE_TYPES,
    PARTS,
    add_adapters,
)
from ..checkpoints.weights import check_file, read_weights
from ..checkpoints.writing import TRAINING_STATE, complete_folder
from ..conversion.plan import make_plan, write_files, write_weights
from ..errors import TrainError
from ..files import read_json
from ..models.layers import random_seed
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration, Lfm2VlModel
from ..options import ImageOptions
from ..prompts.image_processor import NO_OPTIONS
from ..prompts.processor import Lfm2VlProcessor
from .data import (
    Batch,
    Dataset,
    batch_order,
    collate,
    prefetch,
)

OPTIMIZERS = ("adamw", "adam", "muon", "sgd", "lion", "adafactor")
MUON_RATE = 5.0  # Muon's learning rate over that of AdamW, which it leaves vectors and tables to
SCHEDULES = ("cosine", "linear", "constant")
CHECKPOINT = "checkpoint-"
STATE_ARRAYS = "training_state.safetensors"


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. Names are mlx-lm's where it has one.

    Attributes:
        fine_tune_type: `full`, `lora` or `dora`.
        train: parts of the model that learn.
        iters: optimizer steps.
        batch_size: samples per step and machine, before accumulation.
        grad_accumulation_steps: batches whose gradients are added up before a step.
        learning_rate: the highest, after `warmup` steps; it falls to a tenth at the end.
        max_grad_norm: gradients are shortened to this length; 0 leaves them.
        rank, scale, dropout: of adapters; the update is `scale · B · A`.
        num_layers: how many last layers get adapters; -1 for all.
        grad_checkpoint: compute activations again instead of keeping them.
    """

    fine_tune_type: str = "lora"
    train: tuple[str, ...] = ("language",)
    iters: int = 1000
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    num_layers: int = -1
    grad_checkpoint: bool = False
    max_length: int = 4096
    seed: int = 0
    image_options: ImageOptions = NO_OPTIONS

    def __post_init__(self) -> None:
        for name, choices in (
            ("fine_tune_type", FINE_TUNE_TYPES),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
        ):
            if getattr(self, name) not in choices:
                raise TrainError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}"
                )
        unknown = [part for part in self.train if part not in PARTS]
        if unknown or len(self.train) == 0:
            raise TrainError(f"train is {list(self.train)}; choose among {', '.join(PARTS)}")
        for name in ("iters", "batch_size", "grad_accumulation_steps", "rank", "max_length"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.num_layers < 1 and self.num_layers != -1:
            raise TrainError(f"num_layers is {self.num_layers}; it must be 1 or more, or -1")
        if self.optimizer == "adam" and self.weight_decay != 0:
            raise TrainError("adam has no weight_decay; adamw has")
        if not self.learning_rate > 0:
            raise TrainError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.warmup < self.iters:
            raise TrainError(f"warmup is {self.warmup}; it must be below the {self.iters} iters")
        if not 0 <= self.dropout < 1:
            raise TrainError(f"dropout is {self.dropout}; it must be from 0 to below 1")


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: counts from 1.
        loss: mean over the tokens that count, of this step's batches.
        grad_norm: before clipping.
        tokens_per_second: of all tokens, image tokens included, padding excluded.
        peak_memory: in GB, since the start.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    peak_memory: float


def loss_sum(model: Lfm2VlForConditionalGeneration, batch: Batch) -> mx.array:
    """Sum of the cross entropies of a batch's targets, in float32.

    Only positions whose next token counts are projected to the vocabulary.
    """
    if len(batch.targets) == 0:
        return mx.array(0.0)
    hidden = Lfm2VlModel.__call__(
        model, batch.token_ids, batch.pixel_values, batch.spatial_shapes
    ).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.positions)]
    logits = model.language_model.logits(hidden).astype(mx.float32)
    return nn.losses.cross_entropy(logits, mx.array(batch.targets), reduction="sum")


def make_schedule(options: TrainingOptions) -> Callable[[mx.array], mx.array] | float:
    """The learning rate by step: a linear warm-up, then down to a tenth, or constant."""
    rate, rest = options.learning_rate, max(1, options.iters - options.warmup)
    if options.schedule == "cosine":
        after: Any = optim.cosine_decay(rate, rest, rate / 10)
    elif options.schedule == "linear":
        after = optim.linear_schedule(rate, rate / 10, rest)
    elif options.warmup == 0:
        return rate
    else:
        after = lambda step: mx.array(rate)  # noqa: E731 - the form that MLX's schedules have
    if options.warmup == 0:
        return after
    before = optim.linear_schedule(rate / options.warmup, rate, options.warmup)
    return optim.join_schedules([before, after], [options.warmup])


def make_optimizer(options: TrainingOptions) -> optim.Optimizer:
    """An optimizer of MLX. Adam and AdamW correct their bias, as PyTorch's do."""
    rate, decay = make_schedule(options), options.weight_decay
    if options.optimizer == "adamw":
        return optim.AdamW(rate, weight_decay=decay, bias_correction=True)
    if options.optimizer == "adam":
        return optim.Adam(rate, bias_correction=True)
    if options.optimizer == "muon":
        faster = make_schedule(replace(options, learning_rate=MUON_RATE * options.learning_rate))
        rest = optim.AdamW(rate, weight_decay=decay, bias_correction=True)
        return optim.MultiOptimizer([optim.Muon(faster, weight_decay=0.0), rest], [_is_map])
    if options.optimizer == "sgd":
        return optim.SGD(rate, momentum=0.9, weight_decay=decay)
    if options.optimizer == "lion":
        return optim.Lion(rate, weight_decay=decay)
    return optim.Adafactor(rate, weight_decay=decay, relative_step=False)


def _is_map(name: str, weight: mx.array) -> bool:
    """Whether a weight maps one hidden state to another, which Muon is made for."""
    return weight.ndim == 2 and "embed" not in name and "lm_head" not in name


def step(
    model: Lfm2VlForConditionalGeneration,
    optimizer: optim.Optimizer,
    batches: Sequence[Batch],
    max_grad_norm: float,
) -> tuple[mx.array, mx.array]:
    """One optimizer step over several batches, exactly as over one large batch.

    Gradients are those of the mean over all counted tokens of all batches and machines.

    Returns:
        (mean loss, gradient norm before clipping), both scalars, not yet evaluated.
    """
    value_and_grad = nn.value_and_grad(model, loss_sum)
    total, grads = mx.array(0.0), None
    for batch in batches:
        loss, more = value_and_grad(model, batch)
        total = total + loss
        grads = more if grads is None else tree_map(mx.add, grads, more)
        if len(batches) > 1:
            mx.eval(total, grads)  # one batch's activations at a time
    counted = mx.array(float(sum(len(batch.targets) for batch in batches)))
    size = mx.distributed.init().size()
    if size > 1:
        total, counted = mx.distributed.all_sum(total), mx.distributed.all_sum(counted)
        grads = tree_map(lambda grad: grad * size, nn.average_gradients(grads))
    counted = mx.maximum(counted, 1.0)  # every image of the step may be unreadable
    grads = tree_map(lambda grad: grad / counted.astype(grad.dtype), grads)
    limit = max_grad_norm if max_grad_norm > 0 else float("inf")
    grads, norm = optim.clip_grad_norm(grads, limit)
    optimizer.update(model, grads)
    return total / counted, norm


class Trainer:
    """A run: the model, its optimizer, and the place in the data.

    Attributes:
        steps_done: how many optimizer steps were taken.
        skipped: (line, reason) of samples whose images could not be read on the way.
    """

    def __init__(
        self,
        model: Lfm2VlForConditionalGeneration,
        processor: Lfm2VlProcessor,
        dataset: Dataset,
        options: TrainingOptions,
        skip_bad: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.dataset = dataset
        self.options = options
        self.skip_bad = skip_bad
        self.optimizer = make_optimizer(options)
        self.group = mx.distributed.init()
        self.steps_done = 0
        self.skipped: list[tuple[int, str]] = []
        mx.random.seed(options.seed)
        self.adapter_config = prepare(model, options)
        if options.grad_checkpoint:
            model.gradient_checkpointing_enable()
        self.optimizer.init(model.trainable_parameters())

    def run(self) -> Iterator[StepReport]:
        """Takes the steps that are left, and reports each; stop iterating to stop."""
        options, batches = self.options, self._batches()
        while self.steps_done < options.iters:
            start = perf_counter()
            chosen = [next(batches) for _ in range(options.grad_accumulation_steps)]
            self.model.train()
            loss, norm = step(self.model, self.optimizer, chosen, options.max_grad_norm)
            mx.eval(loss, norm, self.model.trainable_parameters(), self.optimizer.state)
            self.model.eval()
            self.steps_done += 1
            tokens = self.group.size() * sum(batch.tokens for batch in chosen)
            self.skipped += [bad for batch in chosen for bad in batch.skipped]
            yield StepReport(
                self.steps_done,
                _number(loss),
                _number(self.optimizer.learning_rate),
                _number(norm),
                tokens / (perf_counter() - start),
                mx.get_peak_memory() / 1e9,
            )

    def save(self, output: Path, source: Path, keep: int = 2) -> Path:
        """Writes a checkpoint that `resume` reads; it is there complete or not at all.

        Args:
            output: folder of the run; the checkpoint becomes `checkpoint-STEP` in it.
            source: folder of the base model, whose other files a full model needs.
            keep: how many checkpoints stay; older ones are removed.
        """
        target = output / f"{CHECKPOINT}{self.steps_done:06}"
        state = dict(tree_flatten(self.optimizer.state, destination={}))
        nbytes = sum(array.nbytes for array in state.values())
        with complete_folder(target, nbytes) as folder:
            mx.save_safetensors(str(folder / STATE_ARRAYS), state)
            _write_json(folder / TRAINING_STATE, self._description())
            write_result(self.model, self.adapter_config, folder, source)
        for old in checkpoints(output)[:-keep]:
            hidden = old.with_name("." + old.name)  # a half removed one must not look complete
            old.rename(hidden)
            shutil.rmtree(hidden)
        return target

    def resume(self, checkpoint: Path) -> None:
        """Goes on where a checkpoint was written; weights, optimizer, data and chance agree.

        Raises:
            TrainError: other options or other data than then.
        """
        before, now = read_json(checkpoint / TRAINING_STATE), self._description()
        for name, value in now["options"].items():
            if before["options"].get(name) != value:
                raise TrainError(
                    f"{checkpoint} was made with {name} {before['options'].get(name)}, not "
                    f"{value}; resume with the same settings"
                )
        for name in ("samples", "machines"):
            if before[name] != now[name]:
                raise TrainError(f"{checkpoint} had {before[name]} {name}, not {now[name]}")
        if before["data"] != now["data"]:
            raise TrainError(f"{checkpoint} was made with other samples; resume with the same data")
        self.steps_done = int(before["step"])
        if self.adapter_config is None:
            weights = read_weights(checkpoint)
        else:
            weights = _load_arrays(checkpoint / ADAPTER_WEIGHTS)
        learned = {
            name: array
            for name, array in weights.items()
            if name in dict(tree_flatten(self.model.trainable_parameters()))
        }
        self.model.load_weights(list(learned.items()), strict=False)
        state = _load_arrays(checkpoint / STATE_ARRAYS)
        self.optimizer.state = tree_unflatten(list(state.items()))
        mx.random.seed(int(before["random_seed"]))
        mx.eval(self.model.parameters(), self.optimizer.state)

    def _description(self) -> dict[str, Any]:
        return {
            "step": self.steps_done,
            "random_seed": random_seed(),
            "samples": len(self.dataset),
            "data": self.dataset.digest,
            "machines": self.group.size(),
            # as JSON gives it back, so that both sides of a comparison look alike
            "options": json.loads(json.dumps(asdict(self.options))),
        }

    def _batches(self) -> Iterator[Batch]:
        """Batches from the present place on, read ahead; each machine takes its share of each."""
        size, rank = self.group.size(), self.group.rank()
        options, samples = self.options, self.dataset.samples

        def jobs() -> Iterator[Callable[[], Batch]]:
            number = self.steps_done * options.grad_accumulation_steps
            together = options.batch_size * size
            epoch, place = divmod(number, len(batch_order(samples, together, options.seed, 0)))
            while True:
                order = batch_order(samples, together, options.seed, epoch)
                for chosen in order[place:]:
                    mine = [samples[i] for i in chosen[rank::size]]
                    yield partial(
                        collate,
                        mine,
                        self.processor.image_processor,
                        options.image_options,
                        skip_bad=self.skip_bad,
                    )
                epoch, place = epoch + 1, 0

        return prefetch(jobs())


def prepare(
    model: Lfm2VlForConditionalGeneration, options: TrainingOptions
) -> dict[str, Any] | None:
    """Chooses what learns: whole parts, or adapters inside of them.

    Returns:
        `adapter_config.json` of the adapters; None for full fine-tuning.
    """
    if options.fine_tune_type != "full":
        return add_adapters(
            model,
            options.train,
            use_dora=options.fine_tune_type == "dora",
            num_layers=options.num_layers,
            rank=options.rank,
            scale=options.scale,
            dropout=options.dropout,
        )
    model.freeze()
    for part in options.train:
        chosen = getattr(model, PARTS[part])
        packed = (nn.QuantizedLinear, nn.QuantizedEmbedding)
        if any(isinstance(module, packed) for module in chosen.modules()):
            raise TrainError(f"{part} is quantized; train adapters, or the original weights")
        chosen.unfreeze()
    return None


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = output.glob(f"{CHECKPOINT}*")
    return sorted(path for path in found if (path / TRAINING_STATE).exists())


def write_result(
    model: Lfm2VlForConditionalGeneration,
    adapter_config: dict[str, Any] | None,
    folder: Path,
    source: Path,
) -> None:
    """Writes what was learnt: adapters in mlx-lm's form, or a whole model that `load` reads."""
    if adapter_config is not None:
        learned = dict(tree_flatten(model.trainable_parameters(), destination={}))
        mx.save_safetensors(str(folder / ADAPTER_WEIGHTS), learned, {"format": "mlx"})
        _write_json(folder / ADAPTER_CONFIG, {**adapter_config, "model": str(source)})
        return
    plan = make_plan(source, None)
    plan.weights = dict(tree_flatten(model.parameters(), destination={}))
    types = {str(array.dtype).split(".")[-1] for array in plan.weights.values()}
    if len(types) == 1:
        plan.config.pop("torch_dtype", None)
        plan.config["dtype"] = types.pop()
    write_weights(folder, plan)
    write_files(folder, plan)


def publish(
    model: Lfm2VlForConditionalGeneration,
    adapter_config: dict[str, Any] | None,
    output: Path,
    source: Path,
) -> None:
    """Puts the result into the folder of the run, file by file, each complete or not at all."""
    with tempfile.TemporaryDirectory(prefix=".result-", dir=output) as folder:
        write_result(model, adapter_config, Path(folder), source)
        for path in Path(folder).iterdir():
            os.replace(path, output / path.name)


def _number(array: mx.array) -> float:
    return cast("float", array.item())


def _load_arrays(path: Path) -> dict[str, mx.array]:
    check_file(path)
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    return arrays


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
