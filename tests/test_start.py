"""Runs that start from a checkpoint: what is taken over, what is not and is said, what freezing keeps."""

import pytest
import torch
from toys import run_config, toy, trained  # noqa: F401

from vqcore.borrowed import weights_of
from vqcore.errors import CheckpointError, ConfigError
from vqcore.tokenizer import Tokenizer
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
PARTS = ("encoder", "proj", "quantizer", "decoder")


@pytest.fixture
def base(tmp_path):
    return trained(tmp_path / "base", run__seed=7)


def at_start(directory, base, **changes):
    """The tokenizer of a run as it begins."""
    from vqcore.run.state import build

    return build(run_config(directory, **changes), torch.device("cpu")).tokenizer


def same(one, other, part):
    theirs = weights_of(getattr(other, part))
    return all(torch.equal(value, theirs[key]) for key, value in weights_of(getattr(one, part)).items())


def test_a_whole_tokenizer_as_it_would_be_used(tmp_path, base, capsys):
    started = at_start(tmp_path / "new", base, model__full_ckpt=str(base))
    assert all(same(started, Tokenizer.load(base), part) for part in PARTS)
    said = capsys.readouterr().out
    assert (
        "model.full_ckpt: encoder, proj, quantizer, decoder from" in said and "newly initialised" not in said
    )


def test_the_encoder_alone(tmp_path, base, capsys):
    fresh = at_start(tmp_path / "fresh", base)
    started = at_start(tmp_path / "new", base, model__encoder_ckpt=str(base))
    assert same(started, Tokenizer.load(base), "encoder")
    assert all(same(started, fresh, part) for part in PARTS[1:])
    assert "proj, quantizer, decoder newly initialised" in capsys.readouterr().out


def test_another_component_stays_at_its_initialisation_and_is_named(tmp_path, base, capsys):
    changes = {"model__decoder": {"name": "toy/denoiser"}, "objective": {"name": "toy/denoising"}}
    started = at_start(tmp_path / "new", base, model__full_ckpt=str(base), **changes)
    assert all(same(started, Tokenizer.load(base), part) for part in PARTS[:3])
    said = capsys.readouterr().out
    assert (
        "decoder newly initialised. decoder is toy/decoder in the checkpoint and toy/denoiser here." in said
    )


def test_other_shapes_stay_whole_and_every_one_is_named(tmp_path, base, capsys):
    wide = {"name": "toy/quantizer", "codebook_size": 32}
    fresh = at_start(tmp_path / "fresh", base, model__quantizer=wide)
    started = at_start(tmp_path / "new", base, model__full_ckpt=str(base), model__quantizer=wide)
    assert same(started, fresh, "quantizer") and same(started, Tokenizer.load(base), "decoder")
    assert "quantizer.embed is (16, 3) in the checkpoint and (32, 3) here" in capsys.readouterr().out


def test_frozen_means_the_tokens_stay_to_the_bit(tmp_path, base):
    run = train(
        run_config(tmp_path / "new", model__full_ckpt=str(base), model__freeze_enc=True, run__steps=9)
    )
    before = Tokenizer.load(base)
    assert all(same(run.tokenizer, before, part) for part in PARTS[:3])
    assert not same(run.tokenizer, before, "decoder")
    for weights in ("model", "ema"):
        after = Tokenizer.load(tmp_path / "new", weights=weights)
        assert after.fingerprint == before.fingerprint
        assert all(same(after, before, part) for part in PARTS[:3])


@pytest.mark.slow
def test_a_frozen_run_is_taken_up_again_without_its_origin(tmp_path, base):
    import shutil

    changes = {"model__full_ckpt": str(base), "model__freeze_enc": True, "optim__horizon": 6}
    train(run_config(tmp_path / "whole", **changes))
    train(run_config(tmp_path / "parts", **changes, run__steps=3))
    shutil.rmtree(base)
    train(run_config(tmp_path / "parts", **changes))
    assert same(Tokenizer.load(tmp_path / "parts"), Tokenizer.load(tmp_path / "whole"), "decoder")
    assert Tokenizer.load(tmp_path / "parts").cfg.model.full_ckpt is None


@pytest.mark.parametrize("changes, error, message", [
    ({"model__full_ckpt": "nowhere"}, CheckpointError, r"model.full_ckpt: nowhere"),
    ({"model__freeze_enc": True}, ConfigError, r"Give this tokenizer with full_ckpt"),
    ({"model__full_ckpt": "BASE", "model__encoder_ckpt": "BASE"}, ConfigError, r"either full_ckpt or encoder_ckpt"),
    ({"model__full_ckpt": "BASE", "model__freeze_enc": True,
      "model__quantizer": {"name": "toy/quantizer", "codebook_size": 32}}, ConfigError,
     r"the tokens would differ from those of .*quantizer.embed is \(16, 3\) in the checkpoint"),
    ({"model__full_ckpt": "BASE", "model__freeze_enc": True, "data__modality": {
        "name": "array", "channels": 2, "size": [8, 8], "range": [-2, 2]}}, ConfigError,
     r"the tokens would differ from those of .*modality \(range"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, base, changes, error, message):
    changes = {key: str(base) if value == "BASE" else value for key, value in changes.items()}
    with pytest.raises(error, match=message):
        train(run_config(tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_nothing_that_fits_is_an_error(tmp_path, base):
    other = {"name": "toy/encoder", "patch": 4}
    config = {"model__encoder": other, "data__modality": {"name": "array", "channels": 3, "size": [8, 8]}}
    with pytest.raises(
        CheckpointError, match=r"none of its parts fits this model. encoder.linear.weight is \(6, 2\)"
    ):
        train(run_config(tmp_path / "new", **config, data__channels=3, model__encoder_ckpt=str(base)))


def test_positions_of_another_size_are_interpolated(tmp_path):
    pytest.importorskip("vqcore_vit")
    from vqcore.protocols import DataSpec  # noqa: F401

    def config(directory, size, **more):
        vit = {"width": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
        modality = {"name": "array", "channels": 2, "size": [size, size], "range": [-1, 1]}
        return run_config(
            directory,
            data__modality=modality,
            data__shape=[size, size],
            model__encoder={"name": "vit/encoder", **vit},
            model__decoder={"name": "vit/decoder", **vit},
            **more,
        )

    from vqcore.run.state import build

    train(config(tmp_path / "small", 16, run__steps=1))
    large = build(
        config(tmp_path / "large", 32, model__full_ckpt=str(tmp_path / "small")), torch.device("cpu")
    )
    small = Tokenizer.load(tmp_path / "small")
    assert small.encoder.pos_emb.shape[2:] == (4, 4) and large.tokenizer.encoder.pos_emb.shape[2:] == (8, 8)
    expected = torch.nn.functional.interpolate(
        small.encoder.pos_emb, (8, 8), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(large.tokenizer.encoder.pos_emb.detach(), expected)
    assert same(large.tokenizer, small, "proj")


@pytest.fixture
def fetched(monkeypatch):
    """Toy encoders and decoders that begin with published weights (sevens); who asked for them, in order."""
    import vqcore_toy.parts

    asked = []
    for part in (vqcore_toy.parts.Encoder, vqcore_toy.parts.Decoder):

        def fetch(self):
            asked.append(type(self).__name__.lower())
            torch.nn.init.constant_(self.linear.weight, 7.0)

        monkeypatch.setattr(part, "fetch", fetch, raising=False)
    return asked


@pytest.mark.slow
def test_published_weights_are_fetched_where_no_checkpoint_fills_the_part(tmp_path, base, fetched):
    from vqcore.cli import main

    begun = at_start(tmp_path / "new", base)
    assert fetched == ["encoder", "decoder"]
    assert all((getattr(begun, part).linear.weight == 7).all() for part in ("encoder", "decoder"))
    begun = at_start(tmp_path / "new", base, model__encoder_ckpt=str(base))
    assert fetched[2:] == ["decoder"] and same(begun, Tokenizer.load(base), "encoder")

    del fetched[:]
    at_start(tmp_path / "new", base, model__full_ckpt=str(base))
    train(run_config(base, run__seed=7, run__steps=8))  # goes on
    assert main(["eval", str(base)]) == 0
    assert main(["export", str(base), str(tmp_path / "made")]) == 0
    assert Tokenizer.load(tmp_path / "made", encoder_only=True).decoder is None
    assert not fetched


def test_a_tokenizer_made_by_hand_fetches_unless_told_otherwise(base, fetched):
    cfg = Tokenizer.load(base).cfg
    assert not Tokenizer(cfg, fetch=False).encoder.linear.weight.eq(7).any() and not fetched
    assert Tokenizer(cfg).encoder.linear.weight.eq(7).all() and fetched == ["encoder", "decoder"]


def test_weights_that_cannot_be_fetched_end_it_before_anything_is_written(tmp_path, monkeypatch):
    import vqcore_toy.parts

    def fetch(self):
        raise CheckpointError("the weights are not here.")

    monkeypatch.setattr(vqcore_toy.parts.Encoder, "fetch", fetch, raising=False)
    with pytest.raises(CheckpointError, match=r"model.encoder: the weights are not here"):
        train(run_config(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
