"""The folder in which every verb has something to do, made once."""

from pathlib import Path

import pytest
from verbs import make_world

from vqcore.registry import registry


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Made once; a case works in a copy (`verbs.copied`)."""
    place = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "fixtures" / "toy"))
        registry.cache_clear()
        make_world(place)
    registry.cache_clear()
    return place


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The names `toy/...` work."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fixtures" / "toy"))
    registry.cache_clear()
    yield
    registry.cache_clear()
