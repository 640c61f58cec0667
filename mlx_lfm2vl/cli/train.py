"""The command line `python -m mlx_lfm2vl.train`, also installed as `mlx-lfm2vl-train`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

from ..errors import DataError, TrainError
from ..options import ImageOptions
from ..training.options import OPTIMIZERS, SCHEDULES, RunOptions, TrainingOptions
from .options import add_image_options, add_model, model_from, options_from
from .terminal import Parser, interruptible, make_parser, run_command

EPILOG = """\
examples:
  %(prog)s --data samples.jsonl --output adapters
  %(prog)s --data samples.jsonl --train-parts language,projector --rank 16 --iters 500
  %(prog)s --model lfm2-4bit --data folder --grad-checkpoint
  %(prog)s --data samples.jsonl --fine-tune-type full --train-parts language,projector,vision
  %(prog)s --config lora.yaml --iters 500
  mlx.launch -n 2 -- %(prog)s --data samples.jsonl
then:
  python -m mlx_lfm2vl.generate --adapter-path adapters --image photo.jpg --prompt "…"
"""
HELP = {
    "output": "folder",
    "save_every": "steps",
    "keep_checkpoints": "the last ones",
    "metric_samples": "validation samples to answer",
    "skip_bad": "leave bad lines out, and count",
    "plot": "draw the losses in the end",
    "fine_tune_type": "lora, dora or full",
    "iters": "steps",
    "batch_size": "per machine",
    "grad_accumulation_steps": "batches whose gradients are added up before a step",
    "optimizer": ", ".join(OPTIMIZERS),
    "learning_rate": "the highest",
    "schedule": ", ".join(SCHEDULES),
    "warmup": "steps",
    "max_grad_norm": "0 is no limit",
    "rank": "of adapters",
    "scale": "of adapters",
    "dropout": "of adapters",
    "num_layers": "last layers with adapters, -1 is all",
    "grad_checkpoint": "compute activations twice instead of keeping them: slower, less memory",
    "max_length": "tokens of a sample",
}
# mlx-lm's names
ALIASES = {"output": ("--adapter-path", "--save-path"), "max_length": ("--max-seq-length",)}


def build_parser() -> Parser:
    """The arguments, named as in mlx-lm's trainer; defaults are those of the options."""
    parser = make_parser(
        "mlx-lfm2vl-train", "Fine-tune LFM2-VL on conversations about images.", EPILOG
    )
    parser.exit_on_error = False  # the place of a wrong value may be a file
    add_model(parser)
    parser.add_argument(
        "--data", help='JSON lines {"messages": […]}, or a folder with train.jsonl and valid.jsonl'
    )
    parser.add_argument("--validation", help="JSON lines for the validation loss")
    parser.add_argument(
        "-c", "--config", help="YAML or JSON file whose keys are flags; flags beside it win"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument(
        "--resume-adapter-file", help="begin with these weights, an adapters.safetensors"
    )
    parser.add_argument(
        "--metric",
        help="also answer validation samples and compare: exact_match, or FILE.py:FUNCTION of "
        "(answer, reference) that returns a number",
    )
    _add_fields(parser, RunOptions)
    training = parser.add_argument_group("training")
    training.add_argument(
        "--train-parts",
        "--train",
        dest="train",
        nargs="?",
        type=lambda text: tuple(part.strip() for part in text.split(",")),
        metavar="PARTS",
        help="of language,projector,vision; a bare --train is accepted, as mlx-lm has it "
        f"(default: {','.join(TrainingOptions.train)})",
    )
    _add_fields(training, TrainingOptions)
    add_image_options(parser)
    return parser


def _add_fields(group: Any, kind: Any) -> None:
    """A flag for each number, text and switch of some options; None stands for its default."""
    for field in fields(kind):
        flags = ("--" + field.name.replace("_", "-"), *ALIASES.get(field.name, ()))
        text = HELP.get(field.name, "")
        if field.default is False:
            group.add_argument(*flags, action="store_true", default=None, help=text)
        elif isinstance(field.default, (int, float, str)):
            text = f"{text} (default: {field.default})".strip()
            group.add_argument(*flags, type=type(field.default), help=text)


def config_flags(parser: argparse.ArgumentParser, file: str) -> list[str]:
    """The flags that a file of settings stands for, in the form of mlx-lm's `lora_config.yaml`.

    Raises:
        TrainError: the file cannot be read, or holds a key or value that no flag takes.
    """
    settings = read_config(file)
    more = settings.pop("lora_parameters", None)
    settings |= more if isinstance(more, dict) else {"lora_parameters": more}
    flags, unknown = [], []
    for key, value in settings.items():
        name = str(key).replace("_", "-")
        flag = f"--no-{name}" if value is False else f"--{name}"
        if not isinstance(value, bool):
            flag += f"={','.join(map(str, value)) if isinstance(value, list) else value}"
        try:
            taken = name not in ("help", "version", "config") and not isinstance(value, dict)
            if value is not None and taken and not parser.parse_known_args([flag])[1]:
                flags.append(flag)
            elif value:  # mlx-lm's files also switch off what there is not here
                unknown.append(str(key))
        except argparse.ArgumentError as error:
            raise TrainError(f"{file}: {error}") from None
    if unknown:
        raise TrainError(f"{file}: {', '.join(unknown)} means nothing here; --help lists all keys")
    return flags


def read_config(file: str) -> dict[str, Any]:
    """The settings of a JSON or YAML file."""
    import json

    from ..training.data import user_path

    load: Any = json.loads
    errors: tuple[type[Exception], ...] = (OSError, ValueError, RecursionError)
    if not file.endswith(".json"):
        try:
            import yaml  # type: ignore[import-untyped]
        except ImportError:
            raise TrainError(f"{file}: YAML needs pyyaml; install it, or write JSON") from None
        load, errors = yaml.safe_load, (*errors, yaml.YAMLError)
    try:
        settings = load(user_path(file).read_text(encoding="utf-8"))
    except errors as error:
        raise TrainError(f"{file} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise TrainError(f"{file} holds no settings; a line is like `iters: 100`")
    return settings


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments and those of the file that `--config` names."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parser.parse_args(argv)
        if args.config is not None:
            args = parser.parse_args([*config_flags(parser, args.config), *argv])
    except argparse.ArgumentError as error:
        parser.error(str(error))
    if args.data is None:
        raise TrainError("--data is missing: a file of JSON lines, or its folder")
    return args


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    run_command("mlx-lfm2vl-train", lambda: run(parse(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    from ..checkpoints.hub import resolve_model
    from ..checkpoints.loading import load
    from ..training.data import find_split, read_dataset, user_path
    from ..training.metrics import load_metric
    from ..training.run import Run, check_plot, open_output
    from ..training.trainer import Trainer

    args.image_options = options_from(args, ImageOptions)
    options, kept = options_from(args, TrainingOptions), options_from(args, RunOptions)
    if kept.plot:
        check_plot()
    metric = None if args.metric is None else load_metric(args.metric)
    train_file, validation_file = (
        find_split(args.data, "train"),
        find_split(args.data, "validation"),
    )
    if args.validation is not None:
        validation_file = user_path(args.validation)
        if not os.path.exists(validation_file):
            raise DataError(f"{validation_file} cannot be read: it does not exist")
    output = user_path(kept.output)
    checkpoint = open_output(output, args.resume)
    source = resolve_model(model_from(args), args.revision)
    model, processor = load(source, dtype=args.dtype)
    read = partial(
        read_dataset,
        processor=processor,
        max_length=options.max_length,
        skip_bad=kept.skip_bad,
        image_options=options.image_options,
        progress=_bar,
    )
    dataset, validation = (
        None if file is None else read(file) for file in (train_file, validation_file)
    )
    assert dataset is not None
    trainer = Trainer(model, processor, dataset, options, skip_bad=kept.skip_bad)
    if trainer.adapter_config is not None:
        trainer.adapter_config |= _base(model_from(args), args.revision)
    if args.resume_adapter_file is not None and checkpoint is None:
        trainer.begin_with(user_path(args.resume_adapter_file))
    reports = [] if checkpoint is None else trainer.resume(checkpoint)
    training = Run(
        trainer, output, source, kept, reports, validation, metric, say=_say, progress=_bar
    )
    with interruptible() as interrupted:
        if not training.train(interrupted):
            raise KeyboardInterrupt


def _base(model: str, revision: str | None) -> dict[str, str]:
    """What finds the base model again: its repository, or its folder from the root."""
    from ..training.data import user_path

    folder = user_path(model)
    if os.path.isdir(folder):
        return {"model": os.path.abspath(folder)}
    return {"model": model} if revision is None else {"model": model, "revision": revision}


def _bar(items: Iterable[Any], unit: str, done: int, total: int) -> Iterator[Any]:
    """Shows on a terminal how far the items are, and the time that is left."""
    if not _is_terminal():
        return iter(items)
    from tqdm import tqdm

    return iter(tqdm(items, unit=unit, initial=done, total=total, leave=False, file=sys.stderr))


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _say(text: str) -> None:
    """A line on stderr, above the bar; if nobody can read it, training continues."""
    try:
        if _is_terminal():
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        elif sys.stderr is not None:
            sys.stderr.write(" ".join(text.split()) + "\n")
    except OSError:
        # nothing may be flushed to it at exit, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
