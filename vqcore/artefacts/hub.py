"""Tokenizers on the Hugging Face hub, through huggingface_hub (an extra). Only the files of an artefact are fetched.

The hub's address is `HF_ENDPOINT`, read when it is needed; cache and credentials are huggingface_hub's own.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from vqcore import __version__
from vqcore.artefacts.folder import FILES
from vqcore.errors import CheckpointError, cannot_import

FOREIGN = ("*.safetensors", "*.json", "*.yaml", "*.yml", "*.txt", "README.md")
"""Files that are downloaded from a repository of another system; pickles come on top if they are allowed."""
PREFIX = "hf://"
"""In front of a hub id wherever a path could stand too: only such a text asks the hub."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def hub_id(text: str) -> tuple[str, str | None] | None:
    """The two parts of `user/name` or `user/name@revision`, with or without `hf://` in front; None for other texts."""
    text = text.removeprefix(PREFIX)
    if not _ID.fullmatch(text):
        return None
    name, _, revision = text.partition("@")
    return name, revision or None


def download(
    id: str, revision: str | None = None, patterns: tuple[str, ...] = FILES, *, cached: bool = False
) -> Path:
    """The folder with a repository's files, downloaded unless they are in the cache. Raises `CheckpointError`.

    With `cached`, nothing is downloaded: files that are not in the cache are an error.
    """
    with _explained(id, revision, cached=cached) as library:
        found = library.snapshot_download(
            id,
            revision=revision,
            allow_patterns=list(patterns),
            endpoint=os.environ.get("HF_ENDPOINT"),
            library_name="vqcore",
            library_version=__version__,
            local_files_only=cached,
        )
    return Path(found)


def upload(
    folder: Path,
    id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "vqcore tokenizer",
) -> str:
    """Upload a folder and return its address; a missing repository (or branch `revision`) is created."""
    with _explained(id, revision) as library:
        api = library.HfApi(
            endpoint=os.environ.get("HF_ENDPOINT"), library_name="vqcore", library_version=__version__
        )
        address = api.create_repo(id, private=private, exist_ok=True)
        if revision:
            api.create_branch(id, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=id, folder_path=folder, revision=revision, commit_message=message)
    return str(address)


@contextlib.contextmanager
def _explained(id: str, revision: str | None, *, cached: bool = False) -> Iterator[ModuleType]:
    """The module huggingface_hub; its errors become one line: what is wrong and what to do."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"{id}: the hub cannot be used: {cannot_import(error, 'huggingface_hub')}"
        ) from error
    wire: Any = getattr(errors, "HTTPError", OSError)
    try:
        yield huggingface_hub
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{id}: access is restricted. Request access on the page of the repository, then run: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{id}: the hub has no revision '{revision}' of it.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{id}: the hub has no such repository, or it is private (then run: hf auth login)."
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{id} is not a hub id: {_answer(error)}.") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, wire, OSError) as error:
        if getattr(error, "response", None) is not None:
            raise CheckpointError(f"{id}: the hub answered: {_answer(error)}.") from error
        offline = isinstance(error, errors.OfflineModeIsEnabled) or isinstance(
            error.__cause__, errors.OfflineModeIsEnabled
        )
        if cached:
            raise CheckpointError(f"{id} is not in the cache of huggingface_hub") from error
        why = "HF_HUB_OFFLINE is set" if offline else _answer(error)
        raise CheckpointError(f"{id}: the hub cannot be reached ({why}).") from error


def _answer(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "not logged in. Run: hf auth login"
    if status == 403:
        return "you may not write there. Check the user or organisation name, and that your token may write"
    cause = error.__cause__ or error
    return next((line for line in str(cause).strip().splitlines() if line), type(cause).__name__).rstrip(".")
