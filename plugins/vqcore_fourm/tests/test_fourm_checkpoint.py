"""Checkpoints of 4M: recorded codes and reconstructions, published architectures, every form of file, bad files."""

import argparse
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vqcore_fourm import arguments, get_image_tokenizer, tables
from vqcore_fourm.checkpoint import Checkpoint

from vqcore.borrowed import weights_of
from vqcore.cli import main
from vqcore.errors import CheckpointError
from vqcore.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "cases.json").read_text())
ARCHITECTURES = json.loads((DATA / "architectures.json").read_text())
FORMAT = "fourm/checkpoint"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    for name in ("vit_t_enc", "vit_t_dec"):
        monkeypatch.setitem(tables.VIT, name, {"width": 32, "depth": 2, "num_heads": 4})


def source_of(case, folder):
    """The case as a file or folder of 4M."""
    if CASES[case]["kwargs"] is None:
        return training_checkpoint(folder / "checkpoint-19.pth")
    if (DATA / case / "config.json").is_file():
        return DATA / case
    if (DATA / case / "model.safetensors").is_file():
        return DATA / case / "model.safetensors"
    shutil.copy(DATA / case / "state.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CASES[case]["kwargs"]))
    return folder


def training_checkpoint(path, **more):
    """Write the recorded training checkpoint; `more` are other entries, or options as `options`."""
    case = DATA / "training_checkpoint_poses"
    options = json.loads((case / "args.json").read_text()) | more.pop("options", {})
    content = {
        "model": load_file(case / "state.safetensors"),
        "model_ema": load_file(case / "ema.safetensors"),
        "epoch": 19,
        "args": argparse.Namespace(**options),
        "scaler": {},
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(content | more, path)
    return path


def read(path, **settings):
    return Tokenizer.load(path, format={"name": FORMAT, **settings}, allow_pickle=True)


def ours(tokens):
    return tokens.unsqueeze(-1) if tokens.ndim == 3 else tokens.movedim(1, -1)


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_recorded_codes_and_reconstructions(tmp_path, case):
    io = load_file(DATA / case / "io.safetensors")
    tokenizer = read(source_of(case, tmp_path))
    inputs = [name for name in io if name.startswith("x")]
    assert inputs
    for name in inputs:
        end = name.removeprefix("x").removeprefix("_")
        end = f"_{end}" if end else ""
        # The input of a tokenizer with undo_std is a picture in -1..1, which 4M computes first.
        codes = tokenizer.encode(io["prepared" if case == "vq_undo_std" else name])
        assert torch.equal(codes, ours(io[f"tokens{end}"]))
        if f"dec{end}" in io:
            assert_close(tokenizer.decode(codes), io[f"dec{end}"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_architectures_have_these_tensors(name):
    args = arguments.check(ARCHITECTURES[name]["kwargs"], name)
    cfg = arguments.to_config(args, encoder_only=False, size=None, where=name)
    with torch.device("meta"):
        made = weights_of(Tokenizer(cfg, fetch=False))
    found = {tables.theirs(key): list(value.shape) for key, value in made.items()}
    for key in tables.POINTWISE:
        found[key] += [1, 1]
    wanted: dict[str, list[int]] = {}
    for key, shape in ARCHITECTURES[name]["tensors"].items():
        key, _, times = key.partition("  (x ")
        wanted |= {key.replace("*", str(i), 1): shape for i in range(int(times[:-1]) if times else 1)}
    assert found == wanted


def test_averaged_weights_by_choice(tmp_path):
    io = load_file(DATA / "training_checkpoint_poses/io.safetensors")
    tokenizer = read(source_of("training_checkpoint_poses", tmp_path), ema=True)
    assert torch.equal(tokenizer.encode(io["x"]), ours(io["tokens_ema"]))
    assert not torch.equal(io["tokens_ema"], io["tokens"])
    assert tokenizer.origin["origin"]["weights"] == "model_ema"
    with pytest.raises(CheckpointError, match="ema=true is for training checkpoints"):
        read(DATA / "hub_vqvae", ema=True)


def test_older_names_of_tensors(tmp_path):
    state = load_file(DATA / "hub_vqvae/model.safetensors")
    save_file(
        {k.replace("quant_proj.", "quant_conv.0."): v for k, v in state.items()},
        tmp_path / "model.safetensors",
    )
    shutil.copy(DATA / "hub_vqvae/config.json", tmp_path)
    assert read(tmp_path).fingerprint == read(DATA / "hub_vqvae").fingerprint


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    training_checkpoint(Path("checkpoint-19.pth"))
    Path("poses").mkdir()
    x = load_file(DATA / "training_checkpoint_poses/io.safetensors")["x"]
    for number, pose in enumerate(x):
        np.save(f"poses/{number}.npy", pose.flatten().numpy())
    assert main(["import", FORMAT, "checkpoint-19.pth", "made"]) == 2
    assert "--allow-pickle" in capsys.readouterr().err and not Path("made").exists()
    assert main(["import", FORMAT, "checkpoint-19.pth", "made", "--allow-pickle"]) == 0
    assert main(["tokenize", "made", "poses", "tokens"]) == 0
    assert main(["tokenize", f"{FORMAT}[ema=true]:checkpoint-19.pth", "poses", "ema", "--allow-pickle"]) == 0
    found = Tokenizer.load("made").load_tokens("tokens")
    assert len(found) == len(x)
    capsys.readouterr()
    assert main(["import", FORMAT, "--list"]) == 0
    said = capsys.readouterr().out
    assert "hf://EPFL-VILAB/4M_tokenizers_semseg_4k_224-448" in said and "non-commercial" in said


def test_the_licence_of_published_weights_is_kept(tmp_path):
    folder = tmp_path / "models--EPFL-VILAB--4M_tokenizers_human-poses_1k_8/snapshots/abc"
    shutil.copytree(DATA / "hub_vqvae", folder)
    assert "non-commercial" in read(folder).origin["origin"]["licence"]
    assert "licence" not in read(DATA / "hub_vqvae").origin["origin"]


def test_drop_in(tmp_path, capsys):
    io = load_file(DATA / "training_checkpoint_poses/io.safetensors")
    training_checkpoint(tmp_path / "poses.pth")
    model, args = get_image_tokenizer("poses", tmp_path, device="cpu")
    assert "poses" in capsys.readouterr().out and not model.training
    assert (args.domain, args.n_channels, args.enc_type) == ("human_poses", 207, "BottleneckMLP/B_1-Wi_32")
    _, loss, tokens = model.encode(io["x"])
    assert torch.equal(tokens, io["tokens"]) and loss.tolist() == [0.0]
    assert_close(model.decode_tokens(tokens), io["dec"])
    assert_close(model.autoencode(io["x"]), io["dec"])
    half, _ = get_image_tokenizer("poses", tmp_path, encoder_only=True, device="cpu", verbose=False)
    assert torch.equal(half.tokenize(io["x"]), io["tokens"])
    with pytest.raises(CheckpointError, match="cannot decode"):
        half.decode_tokens(tokens)
    assert get_image_tokenizer("none", tmp_path, return_None_on_fail=True) is None
    with pytest.raises(CheckpointError, match="no such file"):
        get_image_tokenizer("none", tmp_path)


# ------------------------------------------------------------------------------------------------- bad input


class Foreign:
    """A class that no checkpoint may name; making one writes a file."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize(
    "entries",
    [{"args": Foreign()}, {"options": {"data_path": Foreign()}}, {"loss_balancer": Foreign()}],
    ids=["in place of the arguments", "inside them", "in an unused entry"],
)  # fmt: skip
def test_foreign_classes_are_refused_by_name(tmp_path, monkeypatch, entries):
    monkeypatch.chdir(tmp_path)
    training_checkpoint(Path("checkpoint-0.pth"), **entries)
    with pytest.raises(CheckpointError, match=r"holds more than tensors and plain data: \w*io\.open"):
        read("checkpoint-0.pth")
    assert not Path("ran").exists()
    assert main(["import", FORMAT, "checkpoint-0.pth", "made", "--allow-pickle"]) == 2
    assert not Path("made").exists() and not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1})[:5]], ids=["empty", "text", "cut"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged|no training checkpoint"):
        read(tmp_path / name)


def test_cut_checkpoint(tmp_path):
    path = training_checkpoint(tmp_path / "a.pth")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"encoder_embeddings.rgb.proj.weight": torch.ones(2)}, "generative model, not of a tokenizer"),
        ({"blocks.0.weight": torch.ones(2)}, "it is no tokenizer of 4M"),
        ({"quantize.codes": torch.ones(1), "decoder.time_embed.0.weight": torch.ones(1)}, "is a DiVAE of 4M: "),
        ({"quantize.codes": torch.ones(1), "decoder.controlnet.a": torch.ones(1)}, "is a VQControlNet of 4M: "),
    ],
)  # fmt: skip
def test_other_models(tmp_path, state, text):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=text):
        read(tmp_path)


def test_diffusion_decoder_of_a_training_checkpoint(tmp_path):
    path = training_checkpoint(tmp_path / "a.pth", options={"beta_schedule": "linear"})
    with pytest.raises(CheckpointError, match=r"is a DiVAE of 4M: .* does not read yet"):
        read(path)


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [touch ran]", "!x {}", "[", "{a: 1}"])
def test_objects_in_a_header(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    state = load_file(DATA / "safetensors_with_config/model.safetensors")
    save_file(state, "a.safetensors", {"n_channels": value, "latent_dim": "8"})
    with pytest.raises(CheckpointError, match="n_channels"):
        read("a.safetensors")
    assert not Path("ran").exists()


def test_header_without_configuration(tmp_path):
    save_file({"quantize.codes": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="its header holds no configuration"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("codebook_size", 0, "codebook_size is 0, expected a whole number"),
        ("codebook_size", "50", "codebook_size is '50', expected"),
        ("latent_dim", True, "latent_dim is True"),
        ("latent_dim", 10**12, "latent_dim is 1000000000000"),
        ("ema_decay", 1.0, "ema_decay is 1.0, expected a number from 0 to below 1"),
        ("ema_decay", float("nan"), "ema_decay is nan"),
        ("quant_type", "fsq", "quant_type is 'fsq', expected one of lucid, memcodes"),
        ("norm_codes", "yes", "norm_codes is 'yes', expected true or false"),
        ("patch_size", [16, 16, 16], "patch_size is a list"),
        ("enc_type", "vit_x_enc", "enc_type is 'vit_x_enc', which 4M does not have"),
        ("enc_type", "MLP/six", "enc_type is 'MLP/six', which 4M does not have"),
        ("enc_type", "BottleneckMLP/B_999999-Wi_32", "but the file has only"),
        ("enc_type", "BottleneckMLP/B_0-Wi_32", "depth"),
    ],
)  # fmt: skip
def test_arguments_out_of_range(tmp_path, key, value, text):
    shutil.copy(DATA / "hub_vqvae/model.safetensors", tmp_path)
    config = json.loads((DATA / "hub_vqvae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=text):
        read(tmp_path)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    state = load_file(DATA / "hub_vqvae/model.safetensors")
    del state["quantize._codebook.embed"]
    state |= {"quant_proj.bias": torch.ones(9), "decoder.more": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(DATA / "hub_vqvae/config.json", tmp_path)
    with pytest.raises(CheckpointError) as error:
        read(tmp_path)
    for text in (
        "quantize._codebook.embed is missing",
        "decoder.more is unknown",
        "quant_proj.bias has the shape [9] instead of [8]",
    ):
        assert text in str(error.value)


def test_folders_and_settings(tmp_path):
    with pytest.raises(CheckpointError, match=r"it lacks config.json, model.safetensors"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    shutil.copy(DATA / "hub_vqvae/model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="damaged or no JSON"):
        read(tmp_path)
    assert read(DATA / "hub_vqvae", size=[3, 4]).cfg.size == (3, 4)
    with pytest.raises(ValueError, match="give one or two numbers"):
        Checkpoint.Config(name=FORMAT, size=0)
