"""What reaches out: nothing by itself. Libraries answer from their files here, unless --download was given."""

import os
import subprocess
import sys

import pytest
import torch

from vqcore.network import asked, asking, closed_unless_asked

hub = pytest.importorskip("huggingface_hub")


def test_it_is_asked_for_inside_a_block_only():
    assert not asked()
    with asking(True):
        assert asked()
        with asking(False):
            assert not asked()
        assert asked()
    assert not asked()


@pytest.mark.parametrize("given", [None, "0", "1"])
def test_the_hub_of_libraries_is_closed_and_opened_again(monkeypatch, given):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if given is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", given)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", given == "1")
    with asking(True), closed_unless_asked():
        assert hub.constants.HF_HUB_OFFLINE is (given == "1")
    with pytest.raises(KeyError), closed_unless_asked():
        assert hub.constants.HF_HUB_OFFLINE is True and os.environ["HF_HUB_OFFLINE"] == "1"
        with closed_unless_asked():
            pass
        assert hub.constants.HF_HUB_OFFLINE is True
        raise KeyError
    assert hub.constants.HF_HUB_OFFLINE is (given == "1") and os.environ.get("HF_HUB_OFFLINE") == given


def test_a_library_that_is_imported_inside_is_open_afterwards():
    code = (
        "from vqcore.network import closed_unless_asked\n"
        "with closed_unless_asked():\n"
        "    import huggingface_hub.constants as found\n"
        "    assert found.HF_HUB_OFFLINE\n"
        "assert not found.HF_HUB_OFFLINE"
    )
    free = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=free)


def test_files_of_torch_hub_are_not_fetched(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, *more, **settings: fetched.append(url))
    with closed_unless_asked(), pytest.raises(FileNotFoundError, match=r"net\.pth is not on this machine"):
        torch.hub.load_state_dict_from_url("https://example.org/net.pth", model_dir=str(tmp_path))
    assert not fetched
    torch.save({"a": torch.zeros(1)}, tmp_path / "net.pth")
    with closed_unless_asked():
        assert torch.hub.load_state_dict_from_url("https://example.org/net.pth", model_dir=str(tmp_path))


def test_timm_asks_its_hub_with_download_alone(monkeypatch, tmp_path):
    """The real way of a published timm model, to a hub that notes who asks."""
    timm = pytest.importorskip("timm")
    from vqcore_vit.timm_encoder import TimmEncoder

    from vqcore.errors import CheckpointError
    from vqcore.protocols import DataSpec, fetch

    requests = []

    class Refused(OSError):
        pass

    def refuse(*words, **settings):
        requests.append(words or settings)
        raise Refused("a request went out")

    import socket

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    cfg = TimmEncoder.Config(name="vit/timm-encoder", model="test_vit", pretrained=True)
    encoder = TimmEncoder(cfg, spec=DataSpec(channels=3, size=(160, 160)))
    with closed_unless_asked(), pytest.raises(CheckpointError, match=r"Add --download to fetch them once"):
        fetch(encoder)
    assert not requests and timm.__version__
    with asking(True), closed_unless_asked(), pytest.raises((CheckpointError, OSError)):
        fetch(encoder)
    assert requests
