"""LFM2-VL, Liquid AI's small vision-language models, running natively through MLX."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoints.loading import load
    from .conversion.calibrated import Calibration, convert_calibrated
    from .conversion.fuse import fuse
    from .conversion.plan import convert
    from .conversion.recipes import Quantization
    from .errors import (
        AnswerError,
        ConfigError,
        ConvertError,
        DataError,
        ImageError,
        Lfm2VlError,
        ModelNotFoundError,
        PromptError,
        SnapshotError,
        SourceError,
        TrainError,
        WeightsError,
    )  # fmt: skip
    from .generation.answer import GenerationResponse
    from .generation.asking import ask_json, choose
    from .generation.batch import BatchResult, batch_generate, stream_batch
    from .generation.engine import Engine
    from .generation.estimate import Estimate, estimate
    from .generation.generate import generate, stream_generate
    from .generation.grounding import (
        Block,
        Box,
        detect,
        draw,
        extract,
        layout,
        parse_boxes,
        to_coco,
        to_supervision,
    )  # fmt: skip
    from .generation.speeds import Speeds, read_speeds, remember
    from .generation.usage import Usage
    from .models.config import Lfm2VlConfig
    from .models.lfm2_vl import (
        Lfm2VlForConditionalGeneration,
        Lfm2VlImageOutput,
        Lfm2VlModel,
        Lfm2VlModelOutput,
        Lfm2VlOutput,
    )
    from .options import CacheOptions, ImageOptions, ImageProcessorConfig, Sampling
    from .prompts.constraint import Constraint
    from .prompts.image_processor import Lfm2VlImageProcessor
    from .prompts.processor import Lfm2VlProcessor, Prompt
    from .prompts.question import Question
    from .prompts.tool_calls import ToolCall, parse_calls
    from .prompts.tool_grammar import function_schema
    from .prompts.video import sample_video
    from .serving.frames import Frame, Frames, frames
    from .serving.gate import Gate
    from .serving.pending import AnswerCancelled, PendingAnswer
    from .serving.prefixes import PrefixStore
    from .serving.session import Session
    from .serving.watch import Sighting, Watch, watch
    from .serving.worker import Worker
    from .training.data import read_dataset
    from .training.options import TrainingOptions
    from .training.trainer import Trainer

# module -> names; imported when first used, so that `import mlx_lfm2vl` costs next to nothing
_EXPORTS = {
    name: module
    for module, names in {
        "checkpoints.loading": "load",
        "conversion.calibrated": "Calibration convert_calibrated",
        "conversion.fuse": "fuse",
        "conversion.plan": "convert",
        "conversion.recipes": "Quantization",
        "errors": "AnswerError ConfigError ConvertError DataError ImageError Lfm2VlError "
        "ModelNotFoundError PromptError SnapshotError SourceError TrainError WeightsError",
        "generation.answer": "GenerationResponse",
        "generation.asking": "ask_json choose",
        "generation.batch": "BatchResult batch_generate stream_batch",
        "generation.engine": "Engine",
        "generation.estimate": "Estimate estimate",
        "generation.generate": "generate stream_generate",
        "generation.grounding": "Block Box detect draw extract layout parse_boxes to_coco "
        "to_supervision",
        "generation.speeds": "Speeds read_speeds remember",
        "generation.usage": "Usage",
        "models.config": "Lfm2VlConfig",
        "models.lfm2_vl": "Lfm2VlForConditionalGeneration Lfm2VlImageOutput Lfm2VlModel "
        "Lfm2VlModelOutput Lfm2VlOutput",
        "options": "CacheOptions ImageOptions ImageProcessorConfig Sampling",
        "prompts.constraint": "Constraint",
        "prompts.image_processor": "Lfm2VlImageProcessor",
        "prompts.processor": "Lfm2VlProcessor Prompt",
        "prompts.question": "Question",
        "prompts.tool_calls": "ToolCall parse_calls",
        "prompts.tool_grammar": "function_schema",
        "prompts.video": "sample_video",
        "serving.frames": "Frame Frames frames",
        "serving.gate": "Gate",
        "serving.pending": "AnswerCancelled PendingAnswer",
        "serving.prefixes": "PrefixStore",
        "serving.session": "Session",
        "serving.watch": "Sighting Watch watch",
        "serving.worker": "Worker",
        "training.data": "read_dataset",
        "training.options": "TrainingOptions",
        "training.trainer": "Trainer",
    }.items()
    for name in names.split()
}

__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """`generate` names a function of this package and a module in it; the function wins.

    The import system binds each submodule to its package; here it may not cover an export.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
