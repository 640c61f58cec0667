"""From a path or repository id to a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ModelNotFoundError

# What a model folder needs, and its licence; other formats and sample pictures stay on the server
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md", "LICENSE*")
REPOSITORY_ID = re.compile(r"[\w.-]+/[\w.-]+")

# The small model that comes with this package; a folder of that name in use wins
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model; a repository of the Hugging Face Hub is downloaded first.

    Args:
        model: a folder, `owner/name`, or `demo` for the small model inside this package.
        revision: branch, tag or commit of a repository.

    Raises:
        ModelNotFoundError: neither a folder nor a repository that can be had.
    """
    folder = Path(model).expanduser()
    if str(model) == DEMO and not (folder / "config.json").exists():
        return DEMO_FOLDER
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelNotFoundError(f"{folder} is a file; pass the model's folder")
    if not REPOSITORY_ID.fullmatch(str(model)):
        raise ModelNotFoundError(
            f"{model} does not exist; pass a model folder or a repository such as "
            "LiquidAI/LFM2.5-VL-450M"
        )
    return _download(str(model), revision)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(MODEL_FILES))
        )
    except GatedRepoError:
        reason = "is gated: accept its terms on its page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = (
            "is no folder here and no repository of the Hub (or a private one: `hf auth login`)"
        )
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except LocalEntryNotFoundError:
        reason = "is no folder here, is not in the download cache, and the Hub cannot be reached"
    except (HfHubHTTPError, OSError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"could not be downloaded: {first_line}"
    raise ModelNotFoundError(f"{repository} {reason}")
