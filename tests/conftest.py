"""One torch thread, and the plugins of fixtures/plugins as if installed: real metadata, nothing mocked."""

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from vqcore.registry import Registry, registry

PLUGINS = Path(__file__).parent / "fixtures" / "plugins"
torch.set_num_threads(1)
settings.register_profile("suite", deadline=None)  # a test never asserts a time
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes of borrowed weights are kept in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Registry]]:
    """Put fixture plugins on sys.path; returns a registry of these alone. Nothing of it stays behind."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def install(*names: str, disabled: tuple[str, ...] = ()) -> Registry:
        folders = [str(PLUGINS / name) for name in names]
        for folder in folders:
            monkeypatch.syspath_prepend(folder)
        found = importlib.metadata.distributions(path=folders)
        entries = [entry for dist in found for entry in dist.entry_points if entry.group == "vqcore"]
        return Registry(entries, disabled)

    registry.cache_clear()
    yield install
    registry.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("fixture_", "vqcore_local"))]:
        del sys.modules[name]
