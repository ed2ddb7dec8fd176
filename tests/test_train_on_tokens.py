"""Decoders trained on stored codes: the same losses and gradients as with the encoder, and what is refused."""

import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from toys import run_config, tokenizer_of, toy  # noqa: F401

from vqcore.artefacts.folder import load_tensors
from vqcore.artefacts.stored import store_named
from vqcore.assembly import assemble
from vqcore.check.overlap import copies
from vqcore.cli import main
from vqcore.data.batches import TrainBatches
from vqcore.data.identity import identity
from vqcore.data.reader import Reader, opened, tokenized
from vqcore.data.split import side
from vqcore.errors import ConfigError, DataError
from vqcore.protocols import Coded, View, knows_codes
from vqcore.rng import sample_generators
from vqcore.run.state import build
from vqcore.run.step import detached
from vqcore.testing import checks
from vqcore.tokenizer import Tokenizer
from vqcore.tokens import TokenDataset
from vqcore.tokens.passes import manifest_of
from vqcore.tokens.sharded import tokenize_shards
from vqcore.tokens.shards import Shards
from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")
ARRAY = {
    "data__modality": {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1]},
    "data__input_size": None,
}
RGB = {"data__modality": {"name": "rgb"}, "data__input_size": 8}


def arrays(folder, *keys, shape=(2, 8, 8)):
    rng = np.random.default_rng(0)
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{key}.npy", rng.uniform(-1, 1, shape).astype(np.float32))
    return folder


def pictures(folder, *keys, size=(20, 13)):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for key in keys:
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{key}.png")
    return folder


def stored(tokenizer, source, target, **how):
    tokenize_shards(tokenizer, source, target, **{"size": (8, 8), "batch_size": 2, "shard_size": 3, **how})
    return target


def cropped(tokenizer, source, target, count=3):
    """A store of crops: the first is the middle, the others are drawn."""
    modality, rows = tokenizer.modality, []
    for path in sorted(source.iterdir()):
        raw = modality.read(path)
        for crop in range(count):
            rng = np.random.default_rng([len(rows), crop]) if crop else None
            view = modality.view(modality.extent(raw), (8, 8), rng)
            codes = tokenizer.encode(modality.tensor(raw, view)[None])[0].numpy()
            seen = {
                "start": list(view.start),
                "stop": list(view.stop),
                "flip": view.flip,
                "extent": list(view.extent),
            }
            extras = {"record": path.stem, "crop": crop, "view": seen}
            rows.append(Coded(f"{path.stem}#crop{crop}", codes.astype(np.uint8), extras))
    manifest = {**manifest_of(tokenizer, (8, 8), None), "store": "arrow"}
    shards = Shards(target, store_named("arrow", ""), manifest, 1)
    shards.write(shards.names[0], rows, {"of": len(rows) // count, "failed": []})
    shards.finish()
    return target


def untrained(folder, **changes):
    """A tokenizer for pictures, as initialised."""
    tokenizer_of(run_config(folder, **{**RGB, **changes})).save(folder)
    return folder


def on_codes(run, codes, path, **changes):
    """Changes of a config: a decoder for the codes of a run."""
    data = {"data__name": "tokens", "data__codes": str(codes), "data__path": str(path)}
    return {**data, "model__full_ckpt": str(run), "model__freeze_enc": True, **changes}


def batches(config, parts):
    made = TrainBatches(
        parts.data, parts.tokenizer.modality, parts.extra, config.data,
        seed=0, start_step=0, steps=3, accumulate=1, rank=0, world=1,
    )  # fmt: skip
    return [loaded.batch for loaded in made]


def weights(run, step=6):
    return load_tensors(run / f"checkpoints/step_{step}/model.safetensors")


def logged(run, name):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


# The same as with the encoder


@pytest.mark.slow
def test_a_run_on_codes_is_the_run_with_the_encoder(tmp_path):
    base = toys.trained(tmp_path / "base")
    samples = arrays(tmp_path / "in", *"abcdefg")
    stored(Tokenizer.load(base), samples, tmp_path / "tok")
    whole = on_codes(base, tmp_path / "tok", samples, model__decoder={"name": "toy/decoder", "patch": 4})
    with_encoder = {k: v for k, v in whole.items() if k != "data__codes"} | {"data__name": "folder"}
    train(run_config(tmp_path / "slow", **with_encoder))
    train(run_config(tmp_path / "fast", **whole))
    one, other = weights(tmp_path / "slow"), weights(tmp_path / "fast")
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)
    assert not torch.equal(one["decoder.linear.weight"], weights(base)["decoder.linear.weight"])
    losses = [logged(tmp_path / run, "loss/pixel/mse") for run in ("slow", "fast")]
    assert len(losses[0]) == 6 and np.allclose(*losses, rtol=0, atol=1e-6)
    assert not logged(tmp_path / "fast", "loss/vq/commit")  # it would train nothing


UNET = {
    "name": "unet/unet",
    "patch_size": 2,
    "width": 8,
    "mult": [1],
    "depth": 0,
    "attention": [],
    "norm_groups": 4,
}
FLOW = {"name": "unet/flow", "prediction": "preconditioned"}
slow = lambda changes: pytest.param(changes, marks=pytest.mark.slow)  # noqa: E731
DENOISER = {"model__decoder": UNET, "objective": {"name": "diffusion", "scheduler": FLOW}}


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"name": "reconstruction"}},
        slow({"objective": {"name": "reconstruction", "adversary": {"name": "toy/gan"}}}),
        slow({**DENOISER, "objective": {**DENOISER["objective"], "cls_free_guidance_dropout": 0.5}}),
        slow({**DENOISER, "objective": {"name": "unet/distill", "teacher_steps": 2, "scheduler": FLOW}}),
    ],
    ids=["reconstruction", "adversary", "diffusion", "distill"],
)
def test_losses_and_gradients_are_those_with_the_encoder(tmp_path, changes):
    """For every player, on crops with flips."""
    base = untrained(tmp_path / "base", **(DENOISER if "model__decoder" in changes else {}))
    if changes["objective"]["name"] == "unet/distill":
        changes["objective"]["of"] = str(base)
    source = pictures(tmp_path / "in", *"abcde")
    cropped(Tokenizer.load(base), source, tmp_path / "tok")
    config = run_config(tmp_path / "run", **{**RGB, **on_codes(base, tmp_path / "tok", source), **changes})
    runs = [build(config, torch.device("cpu")) for _ in range(2)]
    for batch in batches(config, runs[0]):
        assert batch.codes.shape == (4, 2, 2, 1) and batch.codes.dtype == torch.int64
        assert torch.equal(runs[0].tokenizer.encode(batch.x), batch.codes)
        found = [turns(run, each) for run, each in zip(runs, (batch, replace(batch, codes=None)))]
        for (terms, grads), (others, wanted) in zip(*found, strict=True):
            assert set(others) - set(terms) <= {"vq/commit"}
            for name, term in terms.items():
                torch.testing.assert_close(term, others[name], rtol=1e-6, atol=1e-6)
            assert any(grad is not None and grad.any() for grad in grads)
            for grad, want in zip(grads, wanted, strict=True):
                torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


def turns(run, batch):
    """Losses and gradients of each player in turn."""
    run.tokenizer.train()
    found, shared = [], {}
    for name in run.player_names:
        player = run.player(name)
        player.optimizer.zero_grad()
        total, out = player.forward(batch, 5, sample_generators(batch.keys, 0), shared)
        total.backward()
        shared = detached(shared)
        found.append((out.terms, [p.grad for p in player.trained]))
    return found


@pytest.mark.slow
def test_the_encoder_does_not_run(tmp_path, monkeypatch):
    base = toys.trained(tmp_path / "base")
    samples = arrays(tmp_path / "in", *"abcdefg")
    stored(Tokenizer.load(base), samples, tmp_path / "tok")
    config = run_config(tmp_path / "run", **on_codes(base, tmp_path / "tok", samples))
    run = build(config, torch.device("cpu"))
    (batch, *_) = batches(config, run)
    monkeypatch.delattr(type(run.tokenizer.encoder), "forward")
    run.player("model").forward(batch, 0, sample_generators(batch.keys, 0), {})


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    base = untrained(tmp_path / "base")
    source = pictures(tmp_path / "in", *"abcde")
    cropped(Tokenizer.load(base), source, tmp_path / "tok")
    how = {**RGB, **on_codes(base, tmp_path / "tok", source)}
    train(run_config(tmp_path / "whole", **how))
    train(run_config(tmp_path / "two", **how, run__steps=4, optim__horizon=6))
    (tmp_path / "tok").rename(tmp_path / "elsewhere")
    how["data__codes"] = str(tmp_path / "elsewhere")
    train(run_config(tmp_path / "two", **how, optim__horizon=6, data__workers=1))
    for file in ("model.safetensors", "state.safetensors"):
        one, two = (tmp_path / run / "checkpoints/step_6" / file for run in ("whole", "two"))
        assert one.read_bytes() == two.read_bytes(), file


# What a sample is


def parts_of(tmp_path, base, codes, path, **changes):
    config = run_config(tmp_path / "run", **{**on_codes(base, codes, path), **changes})
    return config, assemble(config)


def test_crops_windows_tiles_and_rows_are_what_the_tokenizer_saw(tmp_path):
    """The encoder gives the codes of every sample, with the mask of what was filled up."""
    base = untrained(tmp_path / "base", **ARRAY)
    tokenizer = Tokenizer.load(base)
    long = arrays(tmp_path / "long", "a", "b", shape=(2, 12, 20))
    stored(tokenizer, long, tmp_path / "tiles", tiles=True)
    many = arrays(tmp_path / "many", "x", shape=(3, 2, 8, 8))
    arrays(many, "y")
    stored(tokenizer, many, tmp_path / "rows")
    for codes, path, count in (("tiles", long, 12), ("rows", many, 4)):
        _, parts = parts_of(tmp_path, base, tmp_path / codes, path)
        assert len(parts.data) == count
        reader = Reader(parts.data, tokenizer.modality, {})
        for index in range(count):
            sample = reader.read(index, (8, 8), np.random.default_rng(0))
            mask = None if sample.mask is None else sample.mask[None]
            assert (mask is not None) == (codes == "tiles")
            assert torch.equal(tokenizer.encode(sample.x[None], mask)[0], sample.codes), sample.key
            held = reader.read(index, (8, 8), None)
            assert held.codes is None and torch.equal(held.x, sample.x)
    assert parts.data.get(1).shape == (2, 8, 8)


@pytest.mark.slow
def test_long_records_in_windows(tmp_path):
    window = {"data__modality": {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1],
                                 "sizing": ["resize", "window"]}}  # fmt: skip
    base = untrained(tmp_path / "base", **window)
    tokenizer = Tokenizer.load(base)
    long = arrays(tmp_path / "long", *"abcdef", shape=(2, 9, 21))
    stored(tokenizer, long, tmp_path / "tok")
    config, parts = parts_of(tmp_path, base, tmp_path / "tok", long, **window, data__eval_share=0.4)
    assert len(parts.data) + len(parts.eval_data) == 18
    sides = [
        {data.key(i).partition("#")[0] for i in range(len(data))} for data in (parts.data, parts.eval_data)
    ]
    assert not sides[0] & sides[1]  # windows of one record stay on one side
    for batch in batches(config, parts):
        assert torch.equal(tokenizer.encode(batch.x, batch.mask), batch.codes)
    with pytest.raises(ConfigError, match=r"the windows with codes have the size \[8, 8\], not \[8, 16\]"):
        Reader(parts.eval_data, tokenizer.modality, {}).read(0, (8, 16), None)


@pytest.mark.slow
def test_riders_are_cropped_alike(tmp_path):
    base = untrained(tmp_path / "base")
    source = pictures(tmp_path / "in", *"abcde")
    cropped(Tokenizer.load(base), source, tmp_path / "tok")
    more = {"data__extra": {"same": {"name": "rgb"}}, "data__extra_path": {"same": str(source)}}
    config, parts = parts_of(tmp_path, base, tmp_path / "tok", source, **RGB, **more)
    for batch in batches(config, parts):
        assert torch.equal(batch.extras["same"], batch.x)


@pytest.mark.slow
def test_the_view_is_the_stored_one(tmp_path):
    base = untrained(tmp_path / "base")
    tokenizer, source = Tokenizer.load(base), pictures(tmp_path / "in", "a")
    cropped(tokenizer, source, tmp_path / "tok", count=6)
    _, parts = parts_of(tmp_path, base, tmp_path / "tok", source, **RGB)
    rows = [parts.data.coded(index).extras["view"] for index in range(6)]
    assert {row["flip"] for row in rows} == {True, False}
    modality, raw = tokenizer.modality, tokenizer.modality.read(source / "a.png")
    for index, row in enumerate(rows):
        view = View(tuple(row["start"]), tuple(row["stop"]), (8, 8), row["flip"], extent=(20, 13))
        found = Reader(parts.data, modality, {}, most=(8, 8)).read(index, (8, 8), np.random.default_rng(3))
        assert torch.equal(found.x, modality.tensor(raw, view))


def test_the_laws_of_data_sources(tmp_path):
    base = untrained(tmp_path / "base")
    tokenizer, source = Tokenizer.load(base), pictures(tmp_path / "in", *"abcde")
    cropped(tokenizer, source, tmp_path / "tok")
    _, parts = parts_of(tmp_path, base, tmp_path / "tok", source, **RGB)
    checks.check_data(parts.data, tokenizer.modality)
    copy = pickle.loads(pickle.dumps(parts.data))
    assert len(pickle.dumps(parts.data)) < 5000 and copy.made == parts.data.made
    assert not list(copies(parts.data, "data.path"))  # crops of one file are no copies


# What is refused


def refused(tmp_path, capsys, **changes):
    config = toys.run_tree(tmp_path / "run", **changes)
    (tmp_path / "cfg.yaml").write_text(json.dumps(config))
    assert main(["train", str(tmp_path / "cfg.yaml")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert not (tmp_path / "run").exists()
    return error[-1]


@pytest.fixture
def made(tmp_path):
    base = untrained(tmp_path / "base", **ARRAY)
    stored(Tokenizer.load(base), arrays(tmp_path / "in", *"abcdefgh"), tmp_path / "tok")
    return on_codes(base, tmp_path / "tok", tmp_path / "in")


def test_what_does_not_fit_is_one_line(tmp_path, capsys, made):
    says = refused(tmp_path, capsys, **{**made, "model__freeze_enc": False})
    assert (
        "model.freeze_enc: data.name=tokens trains a decoder on codes" in says and "freeze_enc=true" in says
    )
    other = Tokenizer.load(tmp_path / "base")
    other.proj.weight.data += 1
    other.save(tmp_path / "other")
    says = refused(tmp_path, capsys, **{**made, "model__full_ckpt": str(tmp_path / "other")})
    assert "data.codes: these codes were made by another tokenizer: their fingerprint is" in says
    assert "Set model.full_ckpt to the tokenizer that made them." in says
    says = refused(tmp_path, capsys, **made, data__input_size=16)
    assert "has codes of samples of 8x8, and training samples would be 16x16. Set data.input_size=8" in says
    says = refused(
        tmp_path, capsys, **made, data__input_size_min=8, data__input_size_max=16, data__resolution_step=4
    )
    assert "training samples would be 8x8, 12x12, 16x16. Set data.input_size=8" in says
    says = refused(tmp_path, capsys, **{**made, "data__codes": str(tmp_path / "in")})
    assert "data.codes: " in says and "there is no tokens.json in this folder" in says
    for name in "ab":
        (tmp_path / f"in/{name}.npy").unlink()
    arrays(tmp_path / "in", "z")
    says = refused(tmp_path, capsys, **made)
    assert (
        "data.path: 2 of 8 rows of " in says and "have no file here: a, b. Give the folder that was" in says
    )


def test_few_missing_files_cost_themselves_and_files_without_codes_are_counted(tmp_path, made):
    (tmp_path / "in/b.npy").unlink()
    arrays(tmp_path / "in", "y", "z/q")
    base = made["model__full_ckpt"]
    _, parts = parts_of(tmp_path, base, tmp_path / "tok", tmp_path / "in", data__max_bad_share=0.2)
    assert len(parts.data) == 8 and parts.data.left_out == {"without codes": 2}
    with pytest.raises(DataError, match=r"data\.path: .*/b\.npy.* does not exist, and there are codes of it"):
        parts.data.get(1)
    key, why = Reader(parts.data, parts.tokenizer.modality, {}).try_read(1, (8, 8), None)
    assert key == "b" and "does not exist" in why


@pytest.mark.slow
def test_a_file_that_is_another_one_now_is_a_bad_sample(tmp_path):
    base = untrained(tmp_path / "base")
    source = pictures(tmp_path / "in", "a", "b")
    cropped(Tokenizer.load(base), source, tmp_path / "tok")
    Image.new("RGB", (17, 9)).save(source / "a.png")
    _, parts = parts_of(tmp_path, base, tmp_path / "tok", source, **RGB)
    _, why = Reader(parts.data, parts.tokenizer.modality, {}).try_read(1, (8, 8), None)
    assert why == "the file has the extent [9, 17], and its codes were made of [20, 13]"


def test_views_of_another_modality_fit_files_of_other_sizes(tmp_path):
    """As `--views` of a store leaves them: shares of the sides, with the extent that they were drawn for."""
    base = untrained(tmp_path / "base")
    source = pictures(tmp_path / "in", "a", "b")
    cropped(Tokenizer.load(base), source, tmp_path / "tok")
    _, parts = parts_of(tmp_path, base, tmp_path / "tok", source, **RGB)
    data, modality = parts.data, parts.tokenizer.modality
    for index in range(len(data)):
        row, views = data.coded(index), []
        for size in ((13, 20), (26, 41)):
            _, view = tokenized(opened(modality, Image.new("RGB", size)), row, data.made, (8, 8))
            views.append(view)
        assert views[0] == views[1] and list(views[0].start) == row.extras["view"]["start"]


@pytest.mark.slow
def test_held_out_files_need_no_codes(tmp_path, made):
    config, parts = parts_of(tmp_path, made["model__full_ckpt"], tmp_path / "tok", tmp_path / "in",
                             data__eval_path=str(arrays(tmp_path / "held", "h", "i")))  # fmt: skip
    assert [parts.eval_data.key(index) for index in range(2)] == ["h", "i"]
    assert knows_codes(parts.eval_data) is None and knows_codes(parts.data)
    train(config)
    assert logged(tmp_path / "run", "eval/loss/vq/commit")  # an evaluation encodes


@pytest.mark.slow
def test_crops_of_one_file_stay_on_one_side(tmp_path):
    base = untrained(tmp_path / "base")
    source = pictures(tmp_path / "in", *"abcdefgh")
    cropped(Tokenizer.load(base), source, tmp_path / "tok")
    _, parts = parts_of(tmp_path, base, tmp_path / "tok", source, **RGB, data__eval_share=0.4)
    keys = [{data.key(i)[0] for i in range(len(data))} for data in (parts.data, parts.eval_data)]
    assert keys[0] and keys[1] and not keys[0] & keys[1] and len(parts.data) == 3 * len(keys[0])
    assert side(parts.data, run_config(tmp_path / "x").data, "train") is parts.data


@pytest.mark.slow
def test_a_crop_without_a_view_is_refused(tmp_path):
    base = untrained(tmp_path / "base")
    source = pictures(tmp_path / "in", "a", "b")
    cropped(Tokenizer.load(base), source, tmp_path / "tok")
    _, parts = parts_of(tmp_path, base, tmp_path / "tok", source, **RGB)
    row = parts.data.store.row(1)
    bare = replace(row, extras={"record": "a", "crop": 1})
    parts.data.store = SimpleNamespace(**{**vars(parts.data.store), "row": lambda index: bare, "shape": None})
    with pytest.raises(DataError, match=r"tok: a#crop1: this is a crop without a view"):
        parts.data.coded(1)
    manifest = json.loads((tmp_path / "tok/tokens.json").read_text())
    manifest["extras"].remove("view")
    (tmp_path / "tok/tokens.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"data\.codes: .*tok has crops without views"):
        parts_of(tmp_path, base, tmp_path / "tok", source, **RGB)


@pytest.mark.slow
def test_other_codes_are_other_samples(tmp_path):
    """A run does not go on with crops that were drawn anew."""
    base = untrained(tmp_path / "base")
    tokenizer, source = Tokenizer.load(base), pictures(tmp_path / "in", "a", "b")
    found = []
    for name, count in (("one", 2), ("two", 2), ("three", 3)):
        cropped(tokenizer, source, tmp_path / name, count)
        found.append(identity(parts_of(tmp_path, base, tmp_path / name, source, **RGB)[1].data, ()))
    assert found[0] == found[1] != found[2]


# What a model of codes is trained on


def rows(folder, keys, views=None, seed=0, grid=(2, 3)):
    """A store of two shards with codes drawn at random; `views` are those of crops by key."""
    rng = np.random.default_rng(seed)
    manifest = {"format": 1, "fingerprint": "x", "grid": list(grid), "size": [8, 8], "num_codebooks": 1,
                "codebook_size": 300, "dtype": "uint16", "store": "arrow"}  # fmt: skip
    shards = Shards(folder, store_named("arrow", ""), manifest, 2)
    half = len(keys) // 2
    for name, part in zip(shards.names, (keys[:half], keys[half:])):
        made = []
        for key in part:
            record, _, crop = key.partition("#crop")
            extras = {"record": record, "crop": int(crop), "view": views[key]} if views else {}
            made.append(Coded(key, rng.integers(0, 300, (*grid, 1)).astype(np.uint16), extras))
        shards.write(name, made, {"of": len(part), "failed": []})
    shards.finish()
    return folder


def seen(shift=0.0, flip=False):
    return {"start": [0.0, shift], "stop": [0.5, 0.5 + shift], "flip": flip, "extent": [16, 16]}


class TestTokenDataset:
    def test_masks_and_places_from_the_end_are_refused_everywhere(self, tmp_path):
        place = rows(tmp_path / "one", list("abc"), {})
        for data in (TokenDataset(place), TokenDataset({"x": place, "y": place}, common=True)):
            with pytest.raises(IndexError, match="not by a mask"):
                data[np.array([True, False, True])]
            for wrong in ([-1], [0, 3]):
                with pytest.raises(IndexError, match=r"places lie in \[0, 3\)"):
                    data.batch(wrong)

    def test_crops_are_joined_by_file_and_number(self, tmp_path):
        keys = [f"{name}#crop{crop}" for name in "abc" for crop in range(3)]
        views = {key: seen(0.1 * place, place % 2 == 1) for place, key in enumerate(keys)}
        one = rows(tmp_path / "one", keys, views)
        other = rows(tmp_path / "two", keys[::-1], views, seed=1, grid=(4, 1))
        data = TokenDataset({"x": one, "y": other})
        assert len(data) == 9 and data.extras(4)["crop"] == data.extras(4, "y")["crop"] == 1
        batch = data.batch([8, 0])
        assert batch["x"].shape == (2, 2, 3, 1) and batch["y"].shape == (2, 4, 1, 1)
        alone = TokenDataset(other)
        assert torch.equal(batch["y"], alone.batch([0, 8])) and torch.equal(
            data[np.int64(8)]["y"], batch["y"][0]
        )
        for wrong in (seen(0.3), seen(0.4, True)):
            moved = rows(tmp_path / f"moved{wrong['flip']}", keys, {**views, keys[4]: wrong})
            with pytest.raises(
                DataError, match=r"have other crops with the same keys, e\.g\. b#crop1: tokenize one"
            ):
                TokenDataset({"x": one, "y": moved})
        whole = rows(tmp_path / "whole", list("abc"))
        with pytest.raises(
            DataError, match=r"whole lacks 9 of 9 keys \(a#crop0, a#crop1, a#crop2\).*one lacks 3 of 3"
        ):
            TokenDataset({"x": one, "y": whole})

    @pytest.mark.parametrize("ranks", [1, 3])
    def test_ranks_share_the_rows(self, tmp_path, ranks):
        data = TokenDataset({"x": rows(tmp_path / "one", [f"{n:02}" for n in range(10)])})
        for epoch in range(2):
            found = []
            for rank in range(ranks):
                sampler = DistributedSampler(data, ranks, rank, seed=3)
                sampler.set_epoch(epoch)
                found += [batch["x"] for batch in DataLoader(data, batch_size=2, sampler=sampler)]
            there = {tuple(row.flatten().tolist()) for row in torch.cat(found)}
            assert there == {tuple(row.flatten().tolist()) for row in data.batch(range(10))["x"]}

    @pytest.mark.slow
    @pytest.mark.parametrize("way", ["fork", "spawn"])
    def test_workers_give_the_same_rows(self, tmp_path, way):
        keys = [f"{n:02}" for n in range(11)]
        places = {"x": rows(tmp_path / "one", keys), "y": rows(tmp_path / "two", keys[::-1], seed=1)}
        data = TokenDataset(places)
        assert len(pickle.dumps(data)) < 1000
        sampler = BatchSampler(range(11), 3, False)
        made = DataLoader(data, sampler=sampler, batch_size=None, num_workers=1, multiprocessing_context=way)
        found = list(made)
        for label in places:
            assert torch.equal(torch.cat([batch[label] for batch in found]), data.batch(range(11))[label])
