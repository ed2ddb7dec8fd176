"""Every modality on the real path: its smoke recipe trains, beats a constant, and turns files into codes and back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import tokenizer_of

from vqcore.assembly import open_data
from vqcore.cli import main
from vqcore.compose.layers import load
from vqcore.data.batches import EvalBatches
from vqcore.evaluate.measure import build_metrics
from vqcore.protocols import RecordCodes, Window, finishes
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "cfgs/smoke").glob("*.yaml"))
QUICK = ("rgb", "features", "log-mel")
SPLIT = 64
"""Samples that are looked at, at most."""
HIGHER, LOWER = ("psnr", "accuracy"), ("mae",)
"""Metrics that do not say which way is better."""
FIRST = {"distill": ("diffusion", "model.full_ckpt", "objective.of")}
"""Recipes that need the run of another recipe, and their settings that name it."""


def named(path: Path):
    marks = () if path.stem in QUICK else (pytest.mark.slow,)
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """Recipes name the bundled data from the root of the checkout."""
    monkeypatch.chdir(ROOT)


def samples(config: RunConfig, tokenizer: Tokenizer, split: str) -> list:
    """A batch or two of evaluation views of a split."""
    data = open_data(config, tokenizer.modality, {}, split)
    cfg, size = config.data, tuple(tokenizer.cfg.size)
    batches = EvalBatches(
        data, tokenizer.modality, {}, cfg, size=size, batch_size=32, rank=0, world=1, limit=SPLIT, workers=0
    )
    return [tokenizer.prepare(loaded.batch, {}) for loaded in batches]


def constants(tokenizer: Tokenizer, batches: list) -> list[Tensor]:
    """What one guesses who only knows the training data's mean or most frequent class; of masks, all or nothing."""
    spec = tokenizer.spec
    x = torch.cat([batch.x for batch in batches])
    if spec.labels is not None:
        frequency = torch.bincount(x.flatten(), minlength=spec.labels).float()
        return [frequency.reshape(1, -1, *[1] * spec.rank).expand(1, -1, *x.shape[1:])]
    valid = torch.ones_like(x, dtype=torch.bool)
    if batches[0].mask is not None:
        valid = torch.cat([batch.mask for batch in batches]).unsqueeze(1).expand_as(x)
    axes = [0, *range(2, x.ndim)]
    mean = torch.where(valid, x, 0.0).sum(axes, keepdim=True) / valid.sum(axes, keepdim=True)
    ends = [torch.full_like(mean, end) for end in spec.range] if spec.kind == "binary" else []
    return [guess.expand(1, *x.shape[1:]) for guess in (mean, *ends)]


def score(tokenizer: Tokenizer, metric, pairs: list) -> float:
    """The figure that has the metric's own name, over batches `(rebuilt, batch)`."""
    totals: dict[str, Tensor] = {}
    for x_hat, batch in pairs:
        pair = (x_hat, batch.x)
        if getattr(metric, "in_units", False):
            pair = tuple(tokenizer.modality.values(x) for x in pair)
        for name, value in metric.measure(*pair, batch.mask).items():
            totals[name] = totals.get(name, 0) + value
    return metric.summary(totals)[""]


def held_out_files(recipe: Path, config: RunConfig, folder: Path) -> Path:
    """Files of the modality: those the recipe evaluates on, or what its source gives, written as files."""
    source = getattr(config.data, "eval_path", None)
    if source is not None and Path(source).is_dir():
        return Path(source)
    folder.mkdir()
    tokenizer = tokenizer_of(config)
    data = open_data(config, tokenizer.modality, {}, "eval")
    for index in range(3):
        given = data.get(index)
        sample = given.source if isinstance(given, Window) else given
        if ".npy" in tokenizer.modality.suffixes:
            np.save(folder / f"{index}.npy", np.asarray(sample))
        else:
            Image.fromarray(np.asarray(sample)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("recipe", [named(path) for path in RECIPES])
def test_recipe(recipe, tmp_path, capsys):
    """Trains by the command line; the loss falls, the modality's first metric beats a constant, files come back."""
    for plugin in sorted(set(re.findall(r"name: (\w+)/", recipe.read_text()))):
        pytest.importorskip(f"vqcore_{plugin}")
    run, threads = tmp_path / "run", torch.get_num_threads()
    first, *keys = FIRST.get(recipe.stem, (None,))
    settings = [f"run.dir={run}", *(f"{key}={tmp_path / 'first'}" for key in keys)]
    try:
        if first is not None:
            assert main(["train", str(recipe.with_stem(first)), f"run.dir={tmp_path / 'first'}"]) == 0
        assert main(["train", str(recipe), *settings]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    config = load(str(recipe), settings, schema=RunConfig).config
    tokenizer = Tokenizer.load(run)
    guesses = constants(tokenizer, samples(config, tokenizer, "train"))
    held_out = samples(config, tokenizer, "eval")
    name = tokenizer.modality.metrics[0].rpartition("/")[2]
    metric = build_metrics({}, tokenizer)[name]
    better = getattr(metric, "better", "higher" if name in HIGHER else "lower" if name in LOWER else None)
    sign = {"higher": 1, "lower": -1}[better]
    ours = score(tokenizer, metric, [(tokenizer.reconstruct(batch.x), batch) for batch in held_out])
    for guess in guesses:
        theirs = score(tokenizer, metric, [(guess.expand(len(b.x), *guess.shape[1:]), b) for b in held_out])
        assert sign * ours > sign * theirs, f"{name} is {ours:.4g}; a constant has {theirs:.4g}"
    files = held_out_files(recipe, config, tmp_path / "files")
    assert main(["tokenize", str(run), str(files), str(tmp_path / "tokens")]) == 0
    assert main(["decode", str(run), str(tmp_path / "tokens"), str(tmp_path / "rebuilt")]) == 0
    codes = tokenizer.load_tokens(tmp_path / "tokens")
    found = next(iter(codes.values()))
    first = found.codes[0] if isinstance(found, RecordCodes) else found
    assert first.shape == (*tokenizer.grid(), tokenizer.num_codebooks)
    assert first.max() < tokenizer.codebook_size
    rebuilt = [path for path in (tmp_path / "rebuilt").rglob("*") if path.suffix in (".png", ".npy", ".wav")]
    assert len(rebuilt) == len(codes) > 0
    if finishes(tokenizer.modality):  # which reads something else than it shows
        return
    assert rebuilt[0].suffix in tokenizer.modality.suffixes
    if config.data.modality.name != "array":  # whose rebuilt values may leave the declared range
        assert tokenizer.read(rebuilt[0]).shape == held_out[0].x[:1].shape


PUBLISHED = {
    "features/clip-b16_multires": (28, 181_598_752),
    "features/dinov2-b14_multires": (32, 182_360_864),
    "features/imagebind-h14_multires": (32, 183_147_808),
    "vector/dinov2-b14_base": (1, 115_042_048),
    "vector/imagebind-h14_base": (1, 116_091_136),
    "pose/base": (1, 106_683_599),
    "instance/base": (4, 181_550_468),
}
"""Rows of the largest grid, and how many numbers the published tokenizer has, codebooks that follow means aside."""


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_are_the_published_models(recipe):
    """Positions are counted as published: made for the largest size. The recipes keep those of the base run."""
    rows, count = PUBLISHED[recipe]
    largest = [f"model.encoder.input_size_enc={rows}", f"model.decoder.input_size_dec={rows}"]
    path = str(ROOT / f"cfgs/vqvae/{recipe}.yaml")
    config = load(path, largest if "multires" in recipe else [], schema=RunConfig).config
    with torch.device("meta"):
        tokenizer = tokenizer_of(config)
    means = {"quantizer.embed", "quantizer.cluster_size", "quantizer.initted"}
    numbers = sum(value.numel() for name, value in tokenizer.state_dict().items() if name not in means)
    assert (tokenizer.grid()[0], numbers) == (rows, count)


def test_derived_data_are_what_their_readme_says():
    """The features of a photograph and the volumes of a tile, made again."""
    from scipy.fft import dctn

    image = Image.open("data/photos/heldout/raccoon.jpg").convert("YCbCr")
    scale = 96 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 96) // 2, (image.height - 96) // 2
    pixels = np.asarray(image.crop((left, top, left + 96, top + 96))) / 127.5 - 1
    blocks = pixels.reshape(12, 8, 12, 8, 3).transpose(0, 2, 4, 1, 3)
    waves = dctn(blocks, axes=(-2, -1), norm="ortho") / 8
    zigzag = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]
    wanted = [waves[:, :, 0, i, j] for i, j in zigzag] + [waves[:, :, c, 0, 0] for c in (1, 2)]
    assert np.abs(np.load("data/features/heldout/raccoon.npy") - np.stack(wanted)).max() < 0.01

    metres = 10.0 * np.asarray(Image.open("data/earth/heldout/depth/asia/himalaya_n39_e070.png")) - 11000
    windows = (
        metres.reshape(48, 4, 48, 4)
        .mean((1, 3))
        .reshape(3, 16, 3, 16)
        .transpose(0, 2, 1, 3)
        .reshape(9, 16, 16)
    )
    low, high = windows.min((1, 2), keepdims=True), windows.max((1, 2), keepdims=True)
    level = 1 + (windows - low) / np.maximum(high - low, 1.0) * 14
    solid = (np.arange(16)[None, :, None, None] < level[:, None])[:, ::-1]
    assert np.array_equal(np.load("data/volumes/heldout.npz")["solid"][:9], solid)
