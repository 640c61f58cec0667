"""Fine-tuning: one loss, one step, and a run that can be stopped and resumed exactly."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PARTS, add_adapters
from ..checkpoints.weights import check_file, read_weights
from ..checkpoints.writing import TRAINING_STATE, complete_folder, write_json
from ..conversion.plan import make_plan, write_files, write_weights
from ..errors import TrainError
from ..files import REQUIRED, Reader, read_json
from ..models.layers import random_seed
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration, Lfm2VlModel
from ..options import Bound
from ..prompts.processor import Lfm2VlProcessor
from .data import Batch, Dataset, batch_order, collate, prefetch
from .options import TrainingOptions

MUON_RATE = 5.0  # Muon's learning rate over that of AdamW, which it leaves vectors and tables to
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_ARRAYS = "training_state.safetensors"
# the numbers of a checkpoint
STATE = {
    "step": Bound(int, 0, 1 << 40),
    "random_seed": Bound(int, 0, (1 << 64) - 1),
    "samples": Bound(int, 0, 1 << 40),
    "data": Bound(int, 0, (1 << 64) - 1),  # a digest
    "machines": Bound(int, 1, 1 << 20),
}


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


def make_schedule(options: TrainingOptions) -> Callable[[mx.array], mx.array]:
    """The learning rate by step: a linear warm-up, then down to a tenth, or constant."""
    rate, warmup = options.learning_rate, options.warmup
    if options.schedule == "cosine":
        after = optim.cosine_decay(rate, options.iters - warmup, rate / 10)
    else:
        end = rate if options.schedule == "constant" else rate / 10
        after = optim.linear_schedule(rate, end, options.iters - warmup)
    if warmup == 0:
        return after
    before = optim.linear_schedule(rate / warmup, rate, warmup)
    return optim.join_schedules([before, after], [warmup])


def make_optimizer(options: TrainingOptions) -> optim.Optimizer:
    """An optimizer of MLX. Adam and AdamW correct their bias, as PyTorch's do."""
    rate, decay = make_schedule(options), options.weight_decay
    match options.optimizer:
        case "adamw":
            return optim.AdamW(rate, weight_decay=decay, bias_correction=True)
        case "adam":
            return optim.Adam(rate, bias_correction=True)
        case "sgd":
            return optim.SGD(rate, momentum=0.9, weight_decay=decay)
        case "lion":
            return optim.Lion(rate, weight_decay=decay)
        case "adafactor":
            return optim.Adafactor(rate, weight_decay=decay, relative_step=False)
    faster = make_schedule(replace(options, learning_rate=MUON_RATE * options.learning_rate))
    rest = optim.AdamW(rate, weight_decay=decay, bias_correction=True)
    return optim.MultiOptimizer([optim.Muon(faster, weight_decay=0.0), rest], [_is_map])


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

    def save(
        self, output: Path, source: Path, keep: int = 2, reports: Sequence[StepReport] = ()
    ) -> Path:
        """Writes a checkpoint that `resume` reads; it is there complete or not at all.

        Args:
            output: folder of the run; the checkpoint becomes `checkpoint-STEP` in it.
            source: folder of the base model, whose other files a full model needs.
            keep: how many checkpoints stay; older ones are removed.
            reports: of steps that no log holds yet, for `resume` to give back.

        Raises:
            TrainError: it cannot be written; what was there before stays.
            ConvertError: the disk has too little space.
        """
        target = output / f"checkpoint-{self.steps_done:06}"
        state = dict(tree_flatten(self.optimizer.state, destination={}))
        model = self.model
        written = model.parameters if self.adapter_config is None else model.trainable_parameters
        arrays = [array for _, array in tree_flatten(written())]
        nbytes = sum(array.nbytes for array in (*state.values(), *arrays))
        with writing(target), complete_folder(target, nbytes) as folder:
            mx.save_safetensors(str(folder / STATE_ARRAYS), state)
            description = {**self._description(), "reports": [asdict(one) for one in reports]}
            write_json(folder / TRAINING_STATE, description)
            write_result(self.model, self.adapter_config, folder, source)
        for old in checkpoints(output)[:-keep]:
            with writing(old):
                # a half removed one must not look complete
                shutil.rmtree(old.rename(old.with_name("." + old.name)))
        return target

    def resume(self, checkpoint: Path) -> list[StepReport]:
        """Continues from a checkpoint; weights, optimizer, data and chance agree.

        Returns:
            the reports that `save` was given.

        Raises:
            TrainError: other options or other data than then, or a damaged checkpoint.
        """
        before, now = read_state(checkpoint / TRAINING_STATE), self._description()
        for name, value in now["options"].items():
            if (old := before["options"].get(name)) != value:
                raise TrainError(
                    f"{checkpoint} was made with {name} {old}, not {value}; resume with the same "
                    "settings"
                )
        for name in ("samples", "machines"):
            if before[name] != now[name]:
                raise TrainError(f"{checkpoint} had {before[name]} {name}, not {now[name]}")
        if before["data"] != now["data"]:
            raise TrainError(f"{checkpoint} was made with other samples; resume with the same data")
        whole = self.adapter_config is None
        weights = read_weights(checkpoint) if whole else load_arrays(checkpoint / ADAPTER_WEIGHTS)
        learning = dict(tree_flatten(self.model.trainable_parameters()))
        check_shapes(checkpoint, learning, weights)
        state = load_arrays(checkpoint / STATE_ARRAYS)
        check_shapes(checkpoint / STATE_ARRAYS, dict(tree_flatten(self.optimizer.state)), state)
        self.steps_done = before["step"]
        self.model.load_weights([(n, weights[n]) for n in learning], strict=False)
        self.optimizer.state = tree_unflatten(list(state.items()))
        mx.random.seed(before["random_seed"])
        mx.eval(self.model.parameters(), self.optimizer.state)
        return [StepReport(**report) for report in before["reports"]]

    def begin_with(self, file: Path) -> None:
        """Takes the weights of an earlier run, such as its `adapters.safetensors`, to begin with.

        Raises:
            TrainError: the file is missing, or holds a tensor that does not learn here.
        """
        learning = dict(tree_flatten(self.model.trainable_parameters()))
        weights = load_arrays(file)
        for name, array in weights.items():
            if name not in learning or learning[name].shape != array.shape:
                raise TrainError(
                    f"{file}: {name} of shape {array.shape} fits nothing that learns; train the "
                    "same parts with the same type and rank"
                )
        typed = [(name, array.astype(learning[name].dtype)) for name, array in weights.items()]
        self.model.load_weights(typed, strict=False)

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
        read = partial(
            collate,
            image_processor=self.processor.image_processor,
            image_options=options.image_options,
            skip_bad=self.skip_bad,
        )
        order = partial(batch_order, samples, options.batch_size * size, options.seed)

        def jobs() -> Iterator[Callable[[], Batch]]:
            done = self.steps_done * options.grad_accumulation_steps
            first, place = divmod(done, len(order(0)))
            for epoch in count(first):
                for chosen in order(epoch)[place:]:
                    yield partial(read, [samples[i] for i in chosen[rank::size]])
                place = 0

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
    found = {
        int(match[1]): path
        for path in output.glob("checkpoint-*")
        if (match := CHECKPOINT.fullmatch(path.name)) and (path / TRAINING_STATE).exists()
    }
    return [found[number] for number in sorted(found)]


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
        base = {"model": os.path.abspath(source)}
        write_json(folder / ADAPTER_CONFIG, {**base, **adapter_config})
        return
    plan = make_plan(source, None)
    plan.weights = dict(tree_flatten(model.parameters(), destination={}))
    types = {str(array.dtype).split(".")[-1] for array in plan.weights.values()}
    if len(types) == 1:
        plan.config.pop("torch_dtype", None)
        plan.config["dtype"] = types.pop()
    write_weights(folder, plan)
    write_files(folder, plan)


def publish(checkpoint: Path, output: Path) -> None:
    """Copies the result of a checkpoint, file by file, each complete or not at all."""
    for path in checkpoint.iterdir():
        if path.name not in (TRAINING_STATE, STATE_ARRAYS):
            with replaced(output / path.name) as new:
                shutil.copyfile(path, new)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside another that takes its place if everything went well, or vanishes."""
    new = path.with_name("." + path.name)
    try:
        with writing(path):
            yield new
            os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Errors of the disk become a TrainError; MLX has a RuntimeError for them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise TrainError(f"{target} could not be written: {error}") from error


def read_state(file: Path) -> dict[str, Any]:
    """What a checkpoint tells of its run; a TrainError if anything in it is of another kind."""
    data = read_json(file)
    reader = Reader(data, str(file))
    for key, bound in STATE.items():
        reader.get(key, int, default=REQUIRED, bound=bound)
    reader.get("options", dict, default=REQUIRED)
    data["reports"] = reader.get("reports", list, default=[])
    names = {field.name for field in fields(StepReport)}
    for report in data["reports"]:
        good = isinstance(report, dict) and report.keys() == names
        good = good and all(isinstance(value, (int, float)) for value in report.values())
        reader.check(good, "reports", report, "reports of steps")
    return data


def check_shapes(
    source: Path, wanted: Mapping[str, mx.array], found: Mapping[str, mx.array]
) -> None:
    """Raises a TrainError if a checkpoint lacks an array, or has it in another shape."""
    for name, array in wanted.items():
        if name not in found or found[name].shape != array.shape:
            there = f"has {name} of shape {found[name].shape}" if name in found else f"lacks {name}"
            raise TrainError(
                f"{source} {there}; it must have shape {array.shape}; remove this checkpoint to "
                "resume from the one before"
            )


def load_arrays(file: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file."""
    if not os.path.isfile(file):
        raise TrainError(f"{file} does not exist; pass a safetensors file")
    check_file(file)
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return arrays


def _number(array: mx.array) -> float:
    return cast("float", array.item())
