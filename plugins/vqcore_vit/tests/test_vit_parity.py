"""Encoder and decoder against what 4M's computed with the same weights (`parity/README.md`)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from vqcore_vit.positions import sincos_positions
from vqcore_vit.vit import ViTDecoder, ViTEncoder

from vqcore.protocols import DataSpec

TINY = {"width": 32, "depth": 2, "num_heads": 4}
SETTINGS = {
    "vq": {"patch_size": 8, "post_mlp": True},
    "vqvae": {"patch_size": 8, "post_mlp": True},
    "vqvae_no_post_mlp": {"patch_size": 8},
    "vqvae_out_conv": {"patch_size": 8, "post_mlp": True},
    "vqvae_sam": {"patch_size": 8},
    "position_embedding": {"patch_size": 8, "post_mlp": True},
    "patch_size_dec": {"patch_size": 8, "post_mlp": True},
    "featmap": {"patch_proj": False, "patch_size": 14, "post_mlp": True},
}
DECODER = {
    "vqvae_out_conv": {"out_conv": "convnext"},
    "vqvae_sam": {"out_conv": "convnext"},
    "position_embedding": {"input_size_dec": 64},
    "patch_size_dec": {"patch_size": 4},
}
ENCODER = {"position_embedding": {"input_size_enc": 48}}
FORWARD = [
    *[(case, "x", "tokens", "dec") for case in SETTINGS if case not in ("vq", "position_embedding")],
    ("featmap", "x_other", "tokens_other", "dec_other"),
    ("position_embedding", "x32", "tokens_32", "dec_32"),
    ("position_embedding", "x48", "tokens_48", "dec_48"),
    ("position_embedding", "x_wide", "tokens_wide", "dec_wide"),
    ("position_embedding", "x_large", "tokens_large", "dec_large"),
]


def recorded(case):
    return load_file(Path(__file__).parent / "parity" / f"{case}.safetensors")


def part(io, name):
    """The state of one of 4M's parts; its 1x1 convolutions of latents are our linear layers."""
    prefix = f"state/{name}."
    return {k.removeprefix(prefix): v for k, v in io.items() if k.startswith(prefix)}


def linear(state):
    return {"weight": rearrange(state["weight"], "o i 1 1 -> o i"), "bias": state["bias"]}


def data_spec(case):
    channels, size = {"vqvae_sam": (1, 32), "featmap": (24, 4)}.get(case, (3, 32))
    return DataSpec(channels=channels, size=(size, size))


def encoder(case, io):
    cfg = ViTEncoder.Config(**TINY, **SETTINGS[case], **ENCODER.get(case, {}))
    built = ViTEncoder(cfg, spec=data_spec(case))
    built.load_state_dict(part(io, "encoder"))
    return built.eval()


def decoder(case, io):
    cfg = ViTDecoder.Config(**{**TINY, **SETTINGS[case], **DECODER.get(case, {})})
    in_proj = linear(part(io, "post_quant_proj"))
    built = ViTDecoder(cfg, dim=in_proj["weight"].shape[1], spec=data_spec(case))
    built.load_state_dict(part(io, "decoder") | {f"in_proj.{k}": v for k, v in in_proj.items()})
    return built.eval()


def latents(io, z):
    return F.linear(z, **linear(part(io, "quant_proj")))


def codebook(io):
    return io["state/quantize._codebook.embed"]


def codes(io, h):
    return (F.normalize(h, dim=-1) @ F.normalize(codebook(io), dim=-1).T).argmax(-1)


def channels_last(x):
    return rearrange(x, "b d ... -> b ... d")


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("case", [case for case in SETTINGS if case != "position_embedding"])
def test_latents(case):
    io = recorded(case)
    with torch.no_grad():
        assert_close(latents(io, encoder(case, io)(io["x"])), channels_last(io["h"]))


@pytest.mark.parametrize(
    ("case", "x", "e"),
    [
        ("vq", "x", "e"),
        *[
            ("position_embedding", f"x{s}", f"e{s if s[0] == '_' else f'_{s}'}")
            for s in ("32", "48", "_wide", "_large")
        ],
    ],
)
def test_encoder_output(case, x, e):
    io = recorded(case)
    with torch.no_grad():
        assert_close(encoder(case, io)(io[x]), channels_last(io[e]))


@pytest.mark.parametrize(("case", "x", "tokens", "dec"), FORWARD)
def test_codes_and_their_decoding(case, x, tokens, dec):
    io = recorded(case)
    with torch.no_grad():
        found = codes(io, latents(io, encoder(case, io)(io[x])))
        assert torch.equal(found, io[tokens])
        assert_close(decoder(case, io)(codebook(io)[found]), io[dec])


def test_training_step():
    """Forward and backward through both halves, the straight-through estimate and the commitment loss between them."""
    io = recorded("vqvae")
    enc, dec = encoder("vqvae", io).train(), decoder("vqvae", io).train()
    proj = torch.nn.Linear(32, 16)
    proj.load_state_dict(linear(part(io, "quant_proj")))
    h = proj(enc(io["x"]))
    z_q = codebook(io)[codes(io, h)]
    out = dec(h + (z_q - h).detach())
    commit = F.mse_loss(z_q, h)
    loss = F.mse_loss(out, io["x"]) + commit
    loss.backward()
    assert_close(out, io["out"])
    assert_close(commit, io["train_code_loss"].squeeze())
    assert_close(loss, io["loss"])
    whole = torch.nn.ModuleDict({"encoder": enc, "quant_proj": proj, "decoder": dec})
    renamed = {"decoder.in_proj.weight": "post_quant_proj.weight"}
    grads = {renamed.get(k, k): p.grad for k, p in whole.named_parameters()}
    checked = [k.removeprefix("grad/") for k in io if k.startswith("grad/")]
    assert len(checked) == 7
    for name in checked:
        assert_close(grads[name], io[f"grad/{name}"].reshape(grads[name].shape))


@pytest.mark.parametrize(("case", "side"), [("vq", 4), ("position_embedding", 6), ("featmap", 4)])
def test_positions_of_square_grids(case, side):
    assert_close(sincos_positions((side, side), 32), recorded(case)["state/encoder.pos_emb"])
