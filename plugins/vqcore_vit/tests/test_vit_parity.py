"""Encoder and decoder against recorded results of 4M with the same weights (`parity/README.md`)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from vqcore_vit.mlp import MLPDecoder, MLPEncoder
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
WITH_POST_MLP = {"patch_size": 8, "post_mlp": True}
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
    io = {}
    for path in sorted((Path(__file__).parent / "parity").glob(f"{case}.*")):
        io |= load_file(path)
    return io


def part(io, name):
    """The state of one part of a 4M model; 4M's 1x1 convolutions of latents are linear layers here."""
    prefix = f"state/{name}."
    return {k.removeprefix(prefix): v for k, v in io.items() if k.startswith(prefix)}


def linear(state):
    return {"weight": rearrange(state["weight"], "o i 1 1 -> o i"), "bias": state["bias"]}


def data_spec(case):
    channels, size = {"vqvae_sam": (1, 32), "featmap": (24, 4)}.get(case, (3, 32))
    return DataSpec(channels=channels, size=(size, size))


SEMSEG = DataSpec(channels=1, size=(32, 32), kind="categorical", labels=7, range=None)


def encoder(case, io):
    cfg = ViTEncoder.Config(**TINY, **SETTINGS.get(case, WITH_POST_MLP), **ENCODER.get(case, {}))
    spec = DataSpec(channels=5, size=(32, 32), range=None) if case == "semseg" else data_spec(case)
    built = ViTEncoder(cfg, spec=spec)
    built.load_state_dict(part(io, "encoder"))
    return built.eval()


def decoder(case, io):
    cfg = ViTDecoder.Config(**{**TINY, **SETTINGS.get(case, WITH_POST_MLP), **DECODER.get(case, {})})
    in_proj = linear(part(io, "post_quant_proj"))
    spec = SEMSEG if case == "semseg" else data_spec(case)
    built = ViTDecoder(cfg, dim=in_proj["weight"].shape[1], spec=spec)
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
    """Forward and backward pass of encoder, straight-through estimate, commitment loss and decoder."""
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


def embedded(io):
    return rearrange(F.embedding(io["x"], io["state/cls_emb.weight"]), "b h w c -> b c h w")


def test_a_class_map_is_embedded_and_decoded_to_logits():
    io = recorded("semseg")
    with torch.no_grad():
        h = latents(io, encoder("semseg", io)(embedded(io)))
        assert_close(h, channels_last(io["h"]))
        assert torch.equal(codes(io, h), io["tokens"])
        assert_close(decoder("semseg", io)(codebook(io)[io["tokens"]]), io["dec"])


def test_gradient_of_the_class_embedding():
    io = recorded("semseg")
    io["state/cls_emb.weight"].requires_grad_()
    h = latents(io, encoder("semseg", io).train()(embedded(io)))
    z_q = h + (codebook(io)[codes(io, h)] - h).detach()
    loss = F.cross_entropy(decoder("semseg", io).train()(z_q), io["x"])
    loss.backward()
    assert_close(loss, io["loss"])
    assert_close(io["state/cls_emb.weight"].grad, io["grad/cls_emb.weight"])


def test_several_heads_that_share_a_codebook():
    io = recorded("vqvae_multi_codebook")
    with torch.no_grad():
        h = latents(io, encoder("vqvae_multi_codebook", io)(io["x"]))
        assert_close(h, channels_last(io["h"]))
        heads = rearrange(F.linear(h, **part(io, "quantize.project_in")), "b h w (q d) -> b q h w d", q=3)
        found = codes(io, heads)
        assert torch.equal(found, io["tokens"])
        z_q = rearrange(codebook(io)[found], "b q h w d -> b h w (q d)")
        z_q = F.linear(z_q, **part(io, "quantize.project_out"))
        assert_close(decoder("vqvae_multi_codebook", io)(z_q), io["dec"])


MLPS = {  # case -> channels, encoder, decoder
    "mlp_expansion": (
        21,
        {"depth": 2, "width": 24, "expansion": 2},
        {"depth": 1, "width": 40, "expansion": 3},
    ),
    "mlp_standard": (
        21,
        {"kind": "plain", "depth": 3, "width": 32, "activation": "none"},
        {"kind": "plain", "depth": 2, "width": 24, "activation": "none"},
    ),
    "mlp_cosine": (12, {"depth": 2, "width": 32}, {"depth": 2, "width": 32}),
}


def memcodes(io, h):
    """The code with the best key in each head, (b, heads, h, w), and their values (NWT, arXiv 2106.04283)."""
    of_heads = rearrange(h, "b h w (q d) -> b q h w d", q=len(io["state/quantize.codes"]))
    keys, values = (
        torch.einsum("qkd,qde->qke", io["state/quantize.codes"], io[f"state/quantize.{to}.weight"])
        for to in ("to_k", "to_v")
    )
    found = torch.einsum("bqhwd,qkd->bqhwk", of_heads, keys).argmax(-1)
    chosen = [values[head][found[:, head]] for head in range(len(values))]
    return found, torch.cat(chosen, -1)


@pytest.mark.parametrize("case", MLPS)
def test_mlps(case):
    io, (channels, enc, dec) = recorded(case), MLPS[case]
    spec = DataSpec(channels=channels, size=tuple(io["x"].shape[2:]), range=None)
    encoder = MLPEncoder(MLPEncoder.Config(**enc), spec=spec)
    encoder.load_state_dict(part(io, "encoder"))
    in_proj = linear(part(io, "post_quant_proj"))
    decoder = MLPDecoder(MLPDecoder.Config(**dec), dim=in_proj["weight"].shape[1], spec=spec)
    decoder.load_state_dict(part(io, "decoder") | {f"in_proj.{k}": v for k, v in in_proj.items()})
    with torch.no_grad():
        h = latents(io, encoder(io["x"]))
        assert_close(h, channels_last(io["h"]))
        if case == "mlp_cosine":
            found = codes(io, h)
            z_q = codebook(io)[found]
        else:
            found, z_q = memcodes(io, h)
        assert torch.equal(found, io["tokens"])
        assert_close(z_q, channels_last(io["quant"]))
        assert_close(decoder(z_q), io["dec"])
