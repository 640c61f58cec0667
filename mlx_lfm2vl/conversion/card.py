"""Model cards: what a folder holds, where it comes from, how to run it; and their upload."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]

from ..checkpoints.hub import REPOSITORY_ID
from ..errors import ConvertError

# what still holds of a model after its conversion
KEPT = ("base_model", "datasets", "language", "license", "license_link", "license_name", "tags")
FRONT_MATTER = re.compile(r"\s*---\s*\n(.*?\n)---\s*(?:\n|$)", re.DOTALL)
MLX_USE = """```sh
python -m mlx_lfm2vl.generate --model {name} --image photo.jpg --prompt "What is in this image?"
```"""
HF_USE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```"""


def is_repository(origin: str) -> bool:
    """Tells a repository from a local folder that is called like one."""
    return REPOSITORY_ID.fullmatch(origin) is not None and not Path(origin).exists()


def model_card(source: Path, origin: str, name: str, done: str, to_hf: bool) -> str:
    """A README.

    Args:
        source: the folder of the model that was converted; its licence, language and tags stay.
        origin: what the user called it.
        name: of the new folder.
        done: what was done, in a sentence.
        to_hf: for transformers, not for MLX.
    """
    data = {key: value for key, value in _front_matter(source).items() if key in KEPT}
    if is_repository(origin):
        data["base_model"] = origin
    tags = data.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    own = ["lfm2_vl"] if to_hf else ["mlx", "lfm2_vl"]
    kept = [tag for tag in tags if tag not in ("mlx", "lfm2_vl")]
    data |= {
        "library_name": "transformers" if to_hf else "mlx",
        "pipeline_tag": "image-text-to-text",
        "tags": own + kept,
    }
    use = (HF_USE if to_hf else MLX_USE).format(name=name)
    front = yaml.safe_dump(data, allow_unicode=True)
    return f"---\n{front}---\n\n# {name}\n\n{done}\n\n{use}\n"


def _front_matter(source: Path) -> dict[str, Any]:
    """What the README of the source says in its head."""
    card = source / "README.md"
    if not card.is_file():
        return {}
    try:
        head = FRONT_MATTER.match(card.read_text(encoding="utf-8-sig"))
        data = yaml.safe_load(head[1]) if head is not None else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConvertError(f"the head of {card} cannot be read, mend it: {error}") from None
    return data if isinstance(data, dict) else {}


def add_report(folder: Path, table: str) -> None:
    """Adds a fidelity table to the model card."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(f"{text}\n## Fidelity\n\n{table}\n", encoding="utf-8")


def upload(folder: Path, repository: str) -> str:
    """Uploads a folder as it is; gives the address. A ConvertError if the Hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    # its second class is the error of whichever HTTP library the Hub's client goes through
    transport = cast("type[Exception]", HfHubHTTPError.__mro__[1])
    refused = (transport, HFValidationError, LocalTokenNotFoundError, OSError)
    try:
        api = HfApi()
        api.create_repo(repo_id=repository, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repository)
    except refused as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConvertError(f"{folder} could not be uploaded to {repository}: {reason}") from None
    return f"https://huggingface.co/{repository}"
