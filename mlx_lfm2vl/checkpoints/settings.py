"""What a model folder says besides the model: image settings and recommended sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import Json, Reader, read_json
from ..models.config import Lfm2VlConfig, _token_ids
from ..options import GenerationConfig, ImageProcessorConfig, SamplingConfig


def load_image_processor_config(folder: Path, model: Lfm2VlConfig) -> ImageProcessorConfig:
    """Merges `processor_config.json` (flat or nested) and `preprocessor_config.json`.

    Values that stand in neither are looked up at the top of `config.json`, where the first
    checkpoints repeat them, and then fall back to the official defaults.

    Raises:
        ConfigError: two files contradict each other, or the model's own config.
    """
    found: dict[str, tuple[Any, str]] = {}
    for data, file in _image_settings(folder):
        for key, value in data.items():
            if key in found and found[key][0] != value:
                raise ConfigError(
                    f"{key} is {found[key][0]} in {found[key][1]} and {value} in {file}; "
                    "make them equal"
                )
            found[key] = (value, file)
    for key, value in _known_image_settings(read_json(folder / "config.json")).items():
        found.setdefault(key, (value, "config.json"))
    try:
        config = ImageProcessorConfig(**{key: value for key, (value, _) in found.items()})
    except ConfigError as error:
        raise ConfigError(f"{_files(folder, found, str(error))}: {error}") from None
    for key, ours, theirs in (
        ("encoder_patch_size", config.encoder_patch_size, model.vision_config.patch_size),
        ("downsample_factor", config.downsample_factor, model.downsample_factor),
    ):
        if ours != theirs:
            file = found[key][1] if key in found else "the image processor's default"
            raise ConfigError(f"{key} is {ours} in {file} but {theirs} in config.json")
    return config


def _image_settings(folder: Path) -> Iterable[tuple[Json, str]]:
    for file in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / file).exists():
            continue
        data = read_json(folder / file)
        nested = Reader(data, str(folder / file)).get("image_processor", dict, default=None)
        settings = _known_image_settings({**data, **(nested or {})})
        if settings.pop("do_image_splitting", True) is False:
            # a leftover of some conversions, always together with use_thumbnail=false; it cost
            # grounding accuracy, so tiling stays on until a caller turns it off
            settings.pop("use_thumbnail", None)
        yield settings, file


def _files(folder: Path, found: Mapping[str, tuple[Any, str]], error: str) -> str:
    """The file that holds the setting with which an error begins, or all files of settings."""
    files = {file for key, (_, file) in found.items() if error.startswith(f"{key} ")}
    return ", ".join(str(folder / f) for f in sorted(files or {file for _, file in found.values()}))


def _known_image_settings(data: Json) -> dict[str, Any]:
    settings = {}
    for f in fields(ImageProcessorConfig):
        value = data.get(f.name)
        if value is not None:
            settings[f.name] = tuple(value) if isinstance(value, list) else value
    if "encoder_patch_size" not in settings and data.get("patch_size") is not None:
        settings["encoder_patch_size"] = data["patch_size"]
    return settings


def load_generation_config(folder: Path, model: Lfm2VlConfig) -> GenerationConfig:
    """Reads `generation_config.json`; the model cards' sampling if the file gives none."""
    file = "generation_config.json"
    if not (folder / file).exists():
        return GenerationConfig(eos_token_ids=model.eos_token_ids)
    reader = Reader(read_json(folder / file), file)
    eos = _token_ids(reader) or model.eos_token_ids
    given = {
        key: reader.get(key, kind, default=None)
        for key, kind in (
            ("temperature", float),
            ("top_p", float),
            ("top_k", int),
            ("min_p", float),
            ("repetition_penalty", float),
        )
    }
    given = {key: value for key, value in given.items() if value is not None}
    do_sample = reader.get("do_sample", bool, default=None)
    if not given and do_sample is None:
        return GenerationConfig(eos_token_ids=eos)
    if do_sample is False:
        given["temperature"] = 0.0
    else:
        given.setdefault("temperature", 1.0)
    try:
        return GenerationConfig(SamplingConfig(**given), file, eos)
    except ConfigError as error:
        raise ConfigError(f"{folder / file}: {error}") from None
