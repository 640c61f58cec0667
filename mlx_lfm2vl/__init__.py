"""LFM2-VL, Liquid AI's small vision-language models, running natively through MLX."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoints.loading import load
    from .conversion.fuse import fuse
    from .conversion.plan import convert
    from .conversion.recipes import Quantization
    from .errors import (
        ConfigError,
        ConvertError,
        DataError,
        ImageError,
        Lfm2VlError,
        ModelNotFoundError,
        PromptError,
        SnapshotError,
        TrainError,
        WeightsError,
    )
    from .generation.answer import GenerationResponse
    from .generation.batch import BatchRequest, BatchResult, batch_generate, stream_batch
    from .generation.generate import generate, stream_generate
    from .models.config import Lfm2VlConfig
    from .models.lfm2_vl import Lfm2VlForConditionalGeneration, Lfm2VlOutput
    from .options import CacheOptions, ImageOptions, ImageProcessorConfig, Sampling
    from .prompts.image_processor import Lfm2VlImageProcessor
    from .prompts.processor import Lfm2VlProcessor, Prompt
    from .serving.session import Session, Usage
    from .serving.worker import Request, RequestCancelled, Worker
    from .training.data import read_dataset
    from .training.options import TrainingOptions
    from .training.trainer import Trainer

# name -> module; imported when first used, so that `import mlx_lfm2vl` costs next to nothing
_EXPORTS = {
    "BatchRequest": "generation.batch",
    "BatchResult": "generation.batch",
    "CacheOptions": "options",
    "ConfigError": "errors",
    "ConvertError": "errors",
    "DataError": "errors",
    "GenerationResponse": "generation.answer",
    "ImageError": "errors",
    "ImageOptions": "options",
    "ImageProcessorConfig": "options",
    "Lfm2VlConfig": "models.config",
    "Lfm2VlError": "errors",
    "Lfm2VlForConditionalGeneration": "models.lfm2_vl",
    "Lfm2VlImageProcessor": "prompts.image_processor",
    "Lfm2VlOutput": "models.lfm2_vl",
    "Lfm2VlProcessor": "prompts.processor",
    "ModelNotFoundError": "errors",
    "Prompt": "prompts.processor",
    "PromptError": "errors",
    "Quantization": "conversion.recipes",
    "Request": "serving.worker",
    "RequestCancelled": "serving.worker",
    "Sampling": "options",
    "Session": "serving.session",
    "SnapshotError": "errors",
    "TrainError": "errors",
    "Trainer": "training.trainer",
    "TrainingOptions": "training.options",
    "Usage": "serving.session",
    "WeightsError": "errors",
    "Worker": "serving.worker",
    "batch_generate": "generation.batch",
    "convert": "conversion.plan",
    "fuse": "conversion.fuse",
    "generate": "generation.generate",
    "load": "checkpoints.loading",
    "read_dataset": "training.data",
    "stream_batch": "generation.batch",
    "stream_generate": "generation.generate",
}
__all__ = [
    "BatchRequest",
    "BatchResult",
    "CacheOptions",
    "ConfigError",
    "ConvertError",
    "DataError",
    "GenerationResponse",
    "ImageError",
    "ImageOptions",
    "ImageProcessorConfig",
    "Lfm2VlConfig",
    "Lfm2VlError",
    "Lfm2VlForConditionalGeneration",
    "Lfm2VlImageProcessor",
    "Lfm2VlOutput",
    "Lfm2VlProcessor",
    "ModelNotFoundError",
    "Prompt",
    "PromptError",
    "Quantization",
    "Request",
    "RequestCancelled",
    "Sampling",
    "Session",
    "SnapshotError",
    "TrainError",
    "Trainer",
    "TrainingOptions",
    "Usage",
    "WeightsError",
    "Worker",
    "__version__",
    "batch_generate",
    "convert",
    "fuse",
    "generate",
    "load",
    "read_dataset",
    "stream_batch",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
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
