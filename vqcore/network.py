"""Libraries that fetch weights by themselves do so only where the user asked for it, with `--download`.

timm, open_clip and others ask a hub for what is missing on this machine. The core builds parts, lets them `fetch` and
`borrow`, and sets up metrics inside `closed_unless_asked`: there huggingface_hub and `torch.hub` answer from the files
that they have here. What a user names with `hf://` is no concern of this module.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_ASKED: ContextVar[bool] = ContextVar("vqcore_asked", default=False)
_OFFLINE = "HF_HUB_OFFLINE"


def asked() -> bool:
    """Whether the user asked to download what is missing."""
    return _ASKED.get()


@contextmanager
def asking(download: bool) -> Iterator[None]:
    """Inside the block the user asked, or did not ask, to download what is missing."""
    token = _ASKED.set(download)
    try:
        yield
    finally:
        _ASKED.reset(token)


@contextmanager
def closed_unless_asked() -> Iterator[None]:
    """Inside the block libraries use the weights that they have on this machine; a missing file is their `OSError`."""
    with ExitStack() as stack:
        if not asked():
            stack.enter_context(_without_hub())
            stack.enter_context(_without_torch_hub())
        yield


@contextmanager
def _without_hub() -> Iterator[None]:
    # huggingface_hub reads the variable when it is imported, which may happen inside the block or long before it.
    name, given = "huggingface_hub.constants", os.environ.get(_OFFLINE)
    known: Any = sys.modules.get(name)
    offline = known.HF_HUB_OFFLINE if known else (given or "").upper() in ("1", "ON", "YES", "TRUE")
    os.environ[_OFFLINE] = "1"
    _set_offline(True)
    try:
        yield
    finally:
        os.environ.pop(_OFFLINE)
        if given is not None:
            os.environ[_OFFLINE] = given
        _set_offline(offline)


def _set_offline(offline: bool) -> None:
    constants: Any = sys.modules.get("huggingface_hub.constants")
    if constants is not None and offline != constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = offline
        # Before version 1.0 a session keeps what was set when it was made.
        if reset := getattr(sys.modules.get("huggingface_hub"), "reset_sessions", None):
            reset()


@contextmanager
def _without_torch_hub() -> Iterator[None]:
    hub: Any = sys.modules.get("torch.hub")
    if hub is None:
        yield
        return
    real = hub.download_url_to_file

    def refuse(url: str, dst: str, *args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError(f"{Path(dst).name} is not on this machine")

    hub.download_url_to_file = refuse
    try:
        yield
    finally:
        hub.download_url_to_file = real
