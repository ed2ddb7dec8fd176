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
from vqcore.errors import CheckpointError

FOREIGN = ("*.safetensors", "*.json", "*.yaml", "*.yml", "*.txt", "README.md")
"""What is fetched of a repository that another system made, unless pickles are allowed."""
_PREFIX = "hf://"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def hub_id(path: str | Path) -> tuple[str, str | None] | None:
    """`user/name` or `user/name@revision` as its two parts, if a path can be one; `hf://` in front says that it is.

    Without it, what begins with an existing folder is a path.
    """
    text = str(path)
    explicit = text.startswith(_PREFIX)
    text = text.removeprefix(_PREFIX)
    if not _ID.fullmatch(text) or (not explicit and Path(text.partition("/")[0]).exists()):
        return None
    name, _, revision = text.partition("@")
    return name, revision or None


def download(id: str, revision: str | None = None, patterns: tuple[str, ...] = FILES) -> Path:
    """The folder with a repository's files, fetched unless the cache has them. Raises `CheckpointError`."""
    with _explained(id, revision, "there is no such folder here, and ") as library:
        found = library.snapshot_download(
            id,
            revision=revision,
            allow_patterns=list(patterns),
            endpoint=os.environ.get("HF_ENDPOINT"),
            library_name="vqcore",
            library_version=__version__,
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
    """Make the repository (or branch `revision`) if there is none, and upload a folder; returns the address."""
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
def _explained(id: str, revision: str | None, known: str = "") -> Iterator[ModuleType]:
    """huggingface_hub; its errors become one line that begins with what is known already and says what to do."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{id}: {known}the Hugging Face hub needs huggingface_hub: pip install huggingface_hub"
        ) from error
    wire: Any = getattr(errors, "HTTPError", OSError)
    try:
        yield huggingface_hub
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{id}: access is restricted. Ask for it on its page, then: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{id}: has no revision '{revision}' on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{id}: {known}the hub has no such repository, or shows it to members only (then: hf auth login)."
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{id}: is no hub id: {_answer(error)}.") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, wire, OSError) as error:
        if getattr(error, "response", None) is not None:
            raise CheckpointError(f"{id}: the hub says: {_answer(error)}.") from error
        offline = isinstance(error, errors.OfflineModeIsEnabled) or isinstance(
            error.__cause__, errors.OfflineModeIsEnabled
        )
        why = "HF_HUB_OFFLINE is set" if offline else _answer(error)
        raise CheckpointError(f"{id}: {known}the hub cannot be reached ({why}).") from error


def _answer(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "not logged in. Run: hf auth login"
    if status == 403:
        return "you may not write there. Is it your name or organisation, and may your token write?"
    cause = error.__cause__ or error
    return next((line for line in str(cause).strip().splitlines() if line), type(cause).__name__).rstrip(".")
