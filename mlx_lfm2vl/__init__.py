"""LFM2-VL, Liquid AI's small vision-language models, running natively through MLX."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .batch import BatchRequest, BatchResult, batch_generate, stream_batch
    from .config import CacheOptions, ImageOptions, ImageProcessorConfig, Lfm2VlConfig, Sampling
    from .convert import Quantization, convert
    from .data import read_dataset
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
    from .fuse import fuse
    from .generate import GenerationResponse, generate, stream_generate
    from .image_processor import Lfm2VlImageProcessor
    from .loading import load
    from .model import Lfm2VlForConditionalGeneration, Lfm2VlOutput
    from .processor import Lfm2VlProcessor, Prompt
    from .session import Session, Usage
    from .train import Trainer, TrainingOptions
    from .worker import Request, RequestCancelled, Worker

# name -> module; imported when first used, so that `import mlx_lfm2vl` costs next to nothing
_EXPORTS = {
    "BatchRequest": "batch",
    "BatchResult": "batch",
    "CacheOptions": "config",
    "ConfigError": "errors",
    "ConvertError": "errors",
    "DataError": "errors",
    "GenerationResponse": "generate",
    "ImageError": "errors",
    "ImageOptions": "config",
    "ImageProcessorConfig": "config",
    "Lfm2VlConfig": "config",
    "Lfm2VlError": "errors",
    "Lfm2VlForConditionalGeneration": "model",
    "Lfm2VlImageProcessor": "image_processor",
    "Lfm2VlOutput": "model",
    "Lfm2VlProcessor": "processor",
    "ModelNotFoundError": "errors",
    "Prompt": "processor",
    "PromptError": "errors",
    "Quantization": "convert",
    "Request": "worker",
    "RequestCancelled": "worker",
    "Sampling": "config",
    "Session": "session",
    "SnapshotError": "errors",
    "TrainError": "errors",
    "Trainer": "train",
    "TrainingOptions": "train",
    "Usage": "session",
    "WeightsError": "errors",
    "Worker": "worker",
    "batch_generate": "batch",
    "convert": "convert",
    "fuse": "fuse",
    "generate": "generate",
    "load": "loading",
    "read_dataset": "data",
    "stream_batch": "batch",
    "stream_generate": "generate",
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
