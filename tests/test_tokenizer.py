"""The tokenizer on grids of every rank, its artefact, its fingerprint, and what it says about wrong inputs."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from toys import run_tree, toy  # noqa: F401

from vqcore.compose.build import from_tree
from vqcore.config import Config, deciding, slots
from vqcore.errors import CheckpointError, ConfigError, RunError
from vqcore.protocols import Batch
from vqcore.rng import generator
from vqcore.schema import TokenizerConfig
from vqcore.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("toy")
SIZES = {1: (8,), 2: (8, 12), 3: (4, 8, 4)}


def make(
    size=(8, 8),
    seed=0,
    objective="reconstruction",
    decoder="toy/decoder",
    embed_dim: int | None = 5,
    **modality,
):
    tree = run_tree("unused")
    settings = {"name": "array", "channels": 2, "range": [-1, 1], "size": list(size), **modality}
    tree = {
        "modality": settings,
        "size": list(size),
        "model": {**tree["model"], "decoder": {"name": decoder}, "embed_dim": embed_dim},
        "objective": {"name": objective},
    }
    return Tokenizer(from_tree(tree, schema=TokenizerConfig), seed=seed)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_grids_of_every_rank(rank):
    tokenizer, size = make(SIZES[rank]), SIZES[rank]
    x = torch.randn(3, 2, *size)
    codes = tokenizer.encode(x)
    grid = tuple(side // 4 for side in size)
    assert codes.shape == (3, *grid, 1) and codes.dtype == torch.int64 and tokenizer.grid(size) == grid
    assert tokenizer.decode(codes).shape == x.shape
    assert tokenizer.lookup(codes).shape == (3, *grid, 3)
    torch.testing.assert_close(tokenizer.reconstruct(x), tokenizer.decode(codes))


def test_encode_changes_nothing_even_in_training_mode():
    tokenizer = make().train()
    before = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    tokenizer.encode(torch.randn(2, 2, 8, 8))
    assert tokenizer.training
    assert all(torch.equal(v, before[k]) for k, v in tokenizer.state_dict().items())


def test_values_far_outside_the_range_are_said_once(caplog):
    tokenizer = make()
    levels = torch.linspace(0, 255, 128).reshape(1, 2, 8, 8)
    tokenizer.encode(levels / 127.5 - 1)
    tokenizer.encode((levels / 127.5 - 1) * 2.9)
    assert not caplog.messages
    tokenizer.encode(levels)
    tokenizer.encode(-levels)
    (said,) = caplog.messages
    assert "from 0 to 255, but this tokenizer was made for -1 to 1" in said and "Tokenizer.read" in said
    free = make(range=None)
    free.encode(levels)
    assert len(caplog.messages) == 1


def test_class_maps_are_embedded_and_come_back_as_logits():
    tokenizer = make(kind="categorical", labels=5, channels=1, range=None)
    x = torch.randint(5, (2, 8, 8))
    assert tokenizer.embed.weight.shape == (5, 5)
    assert tokenizer.reconstruct(x).shape == (2, 5, 8, 8)
    shown = tokenizer.show(tokenizer.reconstruct(x[:1]))
    assert shown.shape[-2:] == (8, 8) and shown.max() < 5
    batch = Batch(x, ("a", "b"))
    losses = tokenizer.objective.losses(
        tokenizer, batch, player="model", step=0, rng=[generator(0)] * len(x), shared={}
    )
    assert set(losses.terms) == {"pixel/cross_entropy", "vq/commit"}


def test_class_maps_without_an_embedding_are_one_hot(tmp_path):
    classes = {"kind": "categorical", "labels": 5, "channels": 1, "range": None}
    plain, learnt = make(embed_dim=None, **classes), make(**classes)
    assert plain.embed is None and plain.encoder.linear.weight.shape == learnt.encoder.linear.weight.shape
    state = plain.state_dict()
    learnt.load_state_dict({**state, "embed.weight": torch.eye(5)})
    x = torch.randint(5, (2, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(plain.latents(x), learnt.latents(x))
    assert plain.fingerprint != learnt.fingerprint
    plain.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == plain.fingerprint
    with pytest.raises(ValueError, match=r"class ids lie in 0..4"):
        plain.encode(x + 5)
    with pytest.raises(ConfigError, match="embed_dim"):
        make(embed_dim=0, **classes)


def test_a_quantizer_may_ask_for_codes_in_fp32(caplog):
    caplog.set_level("INFO")
    tokenizer, seen = make(), {}
    tokenizer.quantizer.register_forward_pre_hook(lambda module, args: seen.update(z=args[0].dtype))
    tokenizer.decoder.register_forward_hook(lambda module, args, out: seen.update(x_hat=out.dtype))
    exact = tokenizer.encode(x := torch.randn(2, 2, 8, 8).clamp(-1, 1))
    tokenizer.precision = "bf16"
    tokenizer.decode(tokenizer.encode(x))
    assert seen == {"z": torch.bfloat16, "x_hat": torch.bfloat16}
    assert tokenizer.code_precision == "bf16" and not caplog.messages
    tokenizer.quantizer.codes_in_fp32 = True
    assert torch.equal(tokenizer.encode(x), exact) and tokenizer.code_precision == "fp32"
    tokenizer.decode(tokenizer.encode(x))
    assert seen == {"z": torch.float32, "x_hat": torch.bfloat16}
    assert caplog.messages == ["codes are computed in fp32; bf16 is for decoding alone."]
    with torch.autocast("cpu", torch.bfloat16):  # training decides for itself
        assert tokenizer.train().latents(x).dtype == torch.bfloat16


def test_a_mask_reaches_quantizer_and_loss():
    tokenizer = make()
    x = torch.randn(1, 2, 8, 8)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4, :4] = True  # exactly the first of four positions
    seen = {}
    tokenizer.quantizer.register_forward_pre_hook(lambda module, args: seen.update(mask=args[1]))
    losses = tokenizer.objective.losses(
        tokenizer, Batch(x, ("a",), mask), player="model", step=0, rng=[generator(0)], shared={}
    )
    assert seen["mask"].tolist() == [[[True, False], [False, False]]]
    expected = (losses.x_hat - x).square().mean(1)[:, :4, :4].mean()
    torch.testing.assert_close(losses.terms["pixel/mse"], expected)


def test_a_denoiser_is_sampled_through_the_objective():
    tokenizer = make(objective="toy/denoising", decoder="toy/denoiser")
    codes = tokenizer.encode(torch.randn(2, 2, 8, 8))
    first, second = (tokenizer.decode(codes, rng=[generator(7), generator(8)], steps=3) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2, 2, 8, 8)
    assert not torch.equal(first, tokenizer.decode(codes, rng=[generator(8), generator(7)], steps=3))
    alone = tokenizer.decode(codes[1:], rng=[generator(8)], steps=3)
    torch.testing.assert_close(alone, first[1:])  # what is drawn for a sample does not depend on its batch
    assert tokenizer.decode(tokenizer.encode(torch.randn(1, 2, 12, 16))).shape == (1, 2, 12, 16)


def test_extras_travel_to_the_denoiser():
    tokenizer = make(objective="toy/denoising", decoder="toy/denoiser")
    seen = {}
    condition = tokenizer.decoder.condition
    tokenizer.decoder.condition = lambda z_q, **kw: seen.update(kw) or condition(z_q, **kw)
    x, extras = torch.randn(2, 2, 8, 8), {"caption": ["red", "blue"]}
    batch = Batch(x, ("a", "b"), extras=extras)
    tokenizer.objective.losses(
        tokenizer, batch, player="model", step=0, rng=[generator(0)] * len(x), shared={}
    )
    assert seen["extras"] == extras and seen["size"] == (8, 8)
    seen.clear()
    tokenizer.reconstruct(x, extras=extras)
    assert seen["extras"] == extras


def test_an_objective_and_a_decoder_that_do_not_go_together_are_named():
    with pytest.raises(
        ConfigError, match=r"objective 'toy/denoising' needs a denoiser; 'toy/decoder' maps .*toy/denoiser"
    ):
        make(objective="toy/denoising")
    with pytest.raises(
        ConfigError, match=r"'reconstruction' needs a plain decoder; 'toy/denoiser' is a denoiser"
    ):
        make(decoder="toy/denoiser")


def test_a_frozen_encoder_stays_as_it_is():
    tokenizer = make()
    tokenizer.freeze_encoder()
    tokenizer.train()
    assert tokenizer.decoder.training and not tokenizer.encoder.training and not tokenizer.quantizer.training
    trained = {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.requires_grad}
    assert trained == {"decoder"}
    before = tokenizer.fingerprint
    tokenizer.quantize(tokenizer.latents(torch.randn(2, 2, 8, 8)))
    assert tokenizer.fingerprint == before


def test_initial_weights_depend_on_the_seed_part_by_part():
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.proj.weight, other.proj.weight)
    denoiser = make(seed=1, objective="toy/denoising", decoder="toy/denoiser")
    assert torch.equal(one.encoder.linear.weight, denoiser.encoder.linear.weight)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make(seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_save_and_load_give_the_same_codes(tmp_path):
    tokenizer = make(seed=4)
    tokenizer.save(tmp_path / "made")
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == ["README.md", "config.yaml", "model.safetensors", "provenance.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]
    loaded = Tokenizer.load(tmp_path / "made")
    x = torch.randn(3, 2, 8, 8)
    assert not loaded.training and torch.equal(loaded.encode(x), tokenizer.encode(x))
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.cfg == tokenizer.cfg
    encoder = Tokenizer.load(tmp_path / "made", encoder_only=True)
    assert encoder.fingerprint == tokenizer.fingerprint and torch.equal(
        encoder.encode(x), tokenizer.encode(x)
    )
    with pytest.raises(CheckpointError, match="encoder_only"):
        encoder.decode(encoder.encode(x))
    provenance = json.loads((tmp_path / "made" / "provenance.json").read_text())
    assert provenance["components"]["model.encoder"]["distribution"] == "vqcore-toy"
    with pytest.raises(RunError, match="exists already"):
        tokenizer.save(tmp_path / "made")


def test_equal_weights_make_equal_files(tmp_path):
    make(seed=4).save(tmp_path / "a")
    make(seed=4).save(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("vqcore.tokenizer.model_card", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make().save(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: there is no such file"),
        (lambda f: (f / "provenance.json").unlink(), "not a complete tokenizer"),
        (lambda f: (f / "provenance.json").write_text("{"), "provenance.json: damaged: not valid JSON"),
        (lambda f: _flip(f / "model.safetensors"), "model.safetensors: damaged"),
        (lambda f: _cut(f / "model.safetensors"), "model.safetensors: damaged"),
        (lambda f: _flip(f / "config.yaml"), "config.yaml: damaged"),
    ],
)
def test_damaged_artefacts_are_refused_by_name(tmp_path, damage, message):
    make().save(tmp_path / "made")
    damage(tmp_path / "made")
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path / "made")


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    make(size=(8,)).save(tmp_path / "made")
    tokenizer = make(size=(8,), channels=3)
    with pytest.raises(CheckpointError, match="do not fit its config"):
        tokenizer.load_weights(tmp_path / "made")


def test_load_names_what_is_there_instead(tmp_path):
    make().save(tmp_path / "depth")
    with pytest.raises(CheckpointError, match="Did you mean 'depth'"):
        Tokenizer.load(tmp_path / "dept")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither a run .* nor a tokenizer"):
        Tokenizer.load(tmp_path / "empty")


def test_the_fingerprint_follows_what_decides_codes_and_nothing_else():
    base = make(seed=0)
    start = base.fingerprint
    with torch.no_grad():
        base.decoder.linear.weight.add_(1)
    assert base.fingerprint == start
    for part in (base.encoder.linear.weight, base.proj.bias, base.quantizer.embed):
        with torch.no_grad():
            part.view(-1)[0].add_(1e-3)
        assert base.fingerprint != start
        with torch.no_grad():
            part.view(-1)[0].sub_(1e-3)
    cfg = base.cfg
    flipped = dataclasses.replace(cfg, modality=dataclasses.replace(cfg.modality, hflip=0.3))
    ranged = dataclasses.replace(cfg, modality=dataclasses.replace(cfg.modality, range=(-2.0, 2.0)))
    assert Tokenizer(flipped).fingerprint == make(seed=0).fingerprint
    assert Tokenizer(ranged).fingerprint != make(seed=0).fingerprint


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"\(b, 2, size0, size1\), not \(1, 3, 8, 8\)"),
        (torch.zeros(2, 8, 8), r"not \(2, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8, dtype=torch.int64), "input is float"),
        (torch.zeros(1, 2, 9, 8), "no multiple of the patch 4"),
    ],
)
def test_wrong_inputs_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        make().encode(x)


def test_wrong_classes_are_named():
    tokenizer = make(kind="categorical", labels=5, channels=1, range=None)
    with pytest.raises(ValueError, match=r"lie in 0\.\.4, found 0\.\.7"):
        tokenizer.encode(torch.arange(8).repeat(1, 8, 1))


def test_what_is_no_number_gets_no_codes():
    x = torch.zeros(2, 2, 8, 8)
    x[1, 0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"holds nan at \[1, 0, 3, 4\]; all values must be finite"):
        make().encode(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_class_ids_of_any_integer_type(dtype):
    tokenizer = make(kind="categorical", labels=5, channels=1, range=None)
    x = torch.randint(5, (2, 8, 8))
    assert torch.equal(tokenizer.encode(x.to(dtype)), tokenizer.encode(x))


def test_one_sample_is_shown_at_a_time():
    tokenizer = make()
    with pytest.raises(ValueError, match="one sample is shown at a time, not 2"):
        tokenizer.show(torch.zeros(2, 2, 8, 8))
    assert tokenizer.show(torch.zeros(1, 2, 8, 8)).shape == tokenizer.show(torch.zeros(2, 8, 8)).shape
    classes = make(kind="categorical", labels=5, channels=1, range=None)
    for x in (
        torch.zeros(1, 5, 8, 8),
        torch.zeros(5, 8, 8),
        torch.zeros(1, 8, 8).long(),
        torch.zeros(8, 8).long(),
    ):
        assert classes.show(x).shape == (8, 8)


def test_a_part_that_refuses_its_settings_is_named():
    with pytest.raises(ConfigError, match=r"^objective \(reconstruction\): loss=mse with categorical data"):
        make(kind="categorical", labels=5, channels=1, range=None).cfg and Tokenizer(
            dataclasses.replace(
                (cfg := make(kind="categorical", labels=5, channels=1, range=None).cfg),
                objective=dataclasses.replace(cfg.objective, loss="mse"),
            )
        )


def test_read_and_show_are_inverse_for_arrays():
    tokenizer = make()
    array = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8)).astype(np.float32)
    x = tokenizer.read(array)
    assert x.shape == (1, 2, 8, 8)
    np.testing.assert_allclose(tokenizer.show(x), array, atol=1e-6)


def test_facts_are_those_of_the_parts():
    tokenizer = make()
    facts, parts = tokenizer.facts(), dict(tokenizer.named_children())
    assert facts.spec == tokenizer.spec and facts.size == tuple(tokenizer.cfg.size)
    assert facts.grid == tokenizer.grid() and facts.tokens == math.prod(facts.grid)
    assert facts.bits_per_token == tokenizer.num_codebooks * math.log2(tokenizer.codebook_size)
    assert facts.parts.keys() == parts.keys()
    assert sum(p.parameters for p in facts.parts.values()) == sum(p.numel() for p in tokenizer.parameters())
    assert sum(p.buffers for p in facts.parts.values()) == sum(b.numel() for b in tokenizer.buffers())
    twice = tuple(2 * side for side in facts.size)
    assert tokenizer.facts(twice).grid == tokenizer.grid(twice)
    tokenizer.freeze_encoder()
    assert tokenizer.facts().parts["encoder"].trained == 0 < tokenizer.facts().parts["decoder"].trained


def test_settings_at_a_made_default_stay_out_of_the_fingerprint():
    """A later version may add a setting with a `default_factory` without changing what was saved."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(Config):
        options: dict[str, int] = dataclasses.field(default_factory=dict)
        parts: dict[str, Config] = slots("metric")

    def same(kind, name):
        return name

    assert deciding(Later(name="a"), "encoder", same) == {"name": "a"}
    assert deciding(Later(name="a", options={"b": 1}), "encoder", same) == {"name": "a", "options": {"b": 1}}
    nested = Later(name="a", parts={"one": Later(name="b")})
    assert deciding(nested, "encoder", same) == {"name": "a", "parts": {"one": {"name": "b"}}}


@pytest.fixture
def tokenizer():
    return make().eval()


def test_masks_of_another_shape_are_refused(tokenizer):
    x = torch.rand(2, 2, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    assert tokenizer.encode(x, mask).shape == (2, 2, 2, 1)
    z = tokenizer.latents(x)
    tokenizer.quantize(z, mask)
    wrong = (mask[:, None], mask[..., 0], mask[:, :4, :4], mask[:1], mask.mT[:, :4], mask.float(), mask.int())
    for each in wrong:
        with pytest.raises(ValueError, match="a mask"):
            tokenizer.quantize(z, each)
        with pytest.raises(ValueError, match="a mask"):
            tokenizer.encode(x, each)
    with pytest.raises(ValueError, match="a mask"):  # it has the same grid as the right one would have
        tokenizer.encode(torch.rand(2, 2, 8, 8), torch.ones(2, 8, 12, dtype=torch.bool))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int32", "int64", ">u2"])
def test_codes_of_every_integer_type_decode(tokenizer, dtype):
    codes = tokenizer.encode(torch.rand(2, 2, 8, 8))
    expected = tokenizer.decode(codes)
    stored = codes.numpy().astype(dtype)
    assert torch.equal(tokenizer.decode(stored), expected)
    assert torch.equal(tokenizer.lookup(stored), tokenizer.lookup(codes))
    if dtype != ">u2":
        assert torch.equal(tokenizer.decode(torch.from_numpy(stored)), expected)


@pytest.mark.parametrize("wrong", [
    lambda c: c[..., 0], lambda c: c.flatten(1), lambda c: c.flatten(1, 2), lambda c: c[0, 0],
    lambda c: c.movedim(-1, 1), lambda c: c.float(), lambda c: c > 0, lambda c: c.numpy()[..., 0],
    lambda c: c.numpy().astype("f4"), lambda c: c[..., :0], lambda c: c.repeat(1, 1, 1, 2),
])  # fmt: skip
def test_what_cannot_be_codes_is_named(tokenizer, wrong):
    codes = wrong(tokenizer.encode(torch.rand(2, 2, 8, 8)))
    for use in (tokenizer.decode, tokenizer.lookup):
        with pytest.raises(
            ValueError, match=r"codes of this tokenizer are integers \(b, grid0, grid1, 1\), not"
        ):
            use(codes)


def test_no_samples_have_no_codes(tokenizer):
    codes = tokenizer.encode(torch.rand(0, 2, 8, 8), torch.ones(0, 8, 8, dtype=torch.bool))
    assert codes.shape == (0, 2, 2, 1) and codes.dtype == torch.int64
    assert tokenizer.decode(codes).shape == (0, 2, 8, 8)


# Other types of numbers

_VQ = {"name": "quant/vq", "codebook_size": 32, "latent_dim": 4}
QUANTIZERS = {
    "vq": _VQ,
    "euclidean": {**_VQ, "normalize": False},
    "code-dim": {**_VQ, "code_dim": 2},
    "fsq": {"name": "quant/fsq", "levels": [5, 5, 5]},
    "lfq": {"name": "quant/lfq", "codebook_size": 64},
    "bsq": {"name": "quant/bsq", "codebook_size": 64},
    "simvq": {"name": "quant/simvq", "codebook_size": 32, "latent_dim": 4},
    "ibq": {"name": "quant/ibq", "codebook_size": 32, "latent_dim": 4},
    "memcodes": {"name": "quant/memcodes", "codebook_size": 32, "latent_dim": 8},
    "residual": {"name": "quant/residual", "depth": 2, "quantizer": _VQ},
    "product": {"name": "quant/product", "groups": 2, "quantizer": _VQ},
    "vqp": {"name": "quant/vqp", "method": "vq", "codebook_size": 32, "latent_dim": 4},
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_cast_tokenizer_encodes_and_decodes(name):
    """The quantizer keeps its numbers, so the codes are those of its latents in fp32."""
    part = {"width": 16, "depth": 0, "num_heads": 2, "patch_size": 8, "grid_convs": 1}
    tree = {
        "modality": {"name": "rgb"},
        "size": [32, 32],
        "objective": {"name": "reconstruction"},
        "model": {
            "encoder": {"name": "vit/encoder", **part},
            "quantizer": QUANTIZERS[name],
            "decoder": {"name": "vit/decoder", **part},
        },
    }
    whole = Tokenizer(from_tree(tree, schema=TokenizerConfig, file="test")).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    for kind in (torch.bfloat16, torch.half, torch.double):
        cast = copy.deepcopy(whole).to(kind)
        for before, after in zip(whole.quantizer.state_dict().values(), cast.quantizer.state_dict().values()):
            assert torch.equal(before, after) and before.dtype == after.dtype
        with torch.no_grad():
            z = cast.latents(x.to(kind))
            assert z.dtype == kind
            codes = cast.encode(x.to(kind))
            assert torch.equal(codes, whole.quantizer(z.float()).codes)
            assert torch.allclose(cast.decode(codes).float(), whole.decode(codes), atol=0.05)
