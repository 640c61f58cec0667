"""From a path or repository id to a local folder."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from ..errors import ModelNotFoundError

# What a model folder needs, and its licence; other formats and sample pictures stay on the server
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md", "LICENSE*"]
REPOSITORY_ID = re.compile(r"[\w.-]+/[\w.-]+")

T = TypeVar("T")
HUB_PATIENCE = 5.0  # seconds that the Hub may take to say what is new

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
    name = str(model)
    try:
        folder = Path(os.path.expanduser(name))
        if name == DEMO and not (folder / "config.json").exists():
            return DEMO_FOLDER
        if folder.is_dir():
            # of `.` an error should say which folder that is
            return folder if folder.name else folder.resolve()
        if folder.exists():
            raise ModelNotFoundError(f"{folder} is a file; pass the model's folder")
    except (OSError, ValueError) as error:  # too long a name, or a NUL in it
        if isinstance(error, ModelNotFoundError):
            raise
        raise ModelNotFoundError(f"{name!r:.200} is no path: {error}") from None
    if not REPOSITORY_ID.fullmatch(name) or name.startswith((".", "~")):
        raise ModelNotFoundError(
            f"{name!s:.300} does not exist; pass a model folder or a repository such as "
            "LiquidAI/LFM2.5-VL-450M"
        )
    return _download(name, revision)


def _download(repository: str, revision: str | None) -> Path:
    """Asks the Hub for news, shortly, and otherwise takes what the download cache holds."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        cached = _within(2 * HUB_PATIENCE, lambda: _newest(repository, revision))
        if cached is not None:
            return cached
        return Path(snapshot_download(repository, revision=revision, allow_patterns=FILES))
    except GatedRepoError:
        reason = "is gated: accept its terms on its page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = (
            "is no folder here and no repository of the Hub (or a private one: `hf auth login`)"
        )
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except HFValidationError as error:
        reason = f"is no name of a repository: {_first_line(error)}"
    except Exception as error:  # noqa: BLE001 - a captive portal's page, a network's own errors
        cached = _cached(repository, revision)
        if cached is not None:
            return cached
        tried = f"{constants.ENDPOINT} did not help: {_first_line(error)}"
        if constants.HF_HUB_OFFLINE:
            tried = "HF_HUB_OFFLINE is set"
        reason = (
            f"is no folder here and not complete in the download cache, and {tried}. "
            "`--model demo` needs no network, a folder of a model neither; HF_HUB_OFFLINE=1 asks "
            "nobody"
        )
    raise ModelNotFoundError(f"{repository} {reason}")


def _newest(repository: str, revision: str | None) -> Path | None:
    """What the cache holds of the newest commit; otherwise None, if the Hub can list its files."""
    from huggingface_hub import HfApi

    commit = HfApi().model_info(repository, revision=revision, timeout=HUB_PATIENCE).sha
    cached = _cached(repository, commit)
    if cached is None:
        list(HfApi().list_repo_tree(repository, revision=commit, recursive=True))
    return cached


def _cached(repository: str, revision: str | None) -> Path | None:
    """What an earlier download has left, if that is a whole model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repository, revision=revision, allow_patterns=FILES, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    weights = [path.name for path in folder.glob("*.safetensors")]
    # not every huggingface_hub knows what a download that was broken off still lacks
    parts = [int(match[1]) for name in weights if (match := re.search(r"-of-(\d+)\.", name))]
    whole = (folder / "config.json").exists() and len(weights) >= max([1, *parts])
    return folder if whole else None


def _within(seconds: float, action: Callable[[], T]) -> T:
    """What an action gives; a TimeoutError if it takes longer, since not all requests have limits.

    The action is then left to itself, in a thread that does not keep the process alive.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():
            raise
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
