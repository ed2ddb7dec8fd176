"""The conformance kit itself: a good toy of each kind passes, and for every law there is a toy that breaks it."""

import ast
import copy
import dataclasses
import json
import re
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from einops import rearrange, repeat
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from toys import run_tree, toy  # noqa: F401

from vqcore import protocols
from vqcore.borrowed import read, sha256
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.config import Config as Base
from vqcore.config import to_tree
from vqcore.errors import CheckpointError, ConfigError, DataError
from vqcore.metrics.pixels import MAE
from vqcore.metrics.sums import per_sample
from vqcore.modalities.views import pixels, sized_box, view_of
from vqcore.objectives import Reconstruction
from vqcore.plugin import KINDS, hookimpl
from vqcore.protocols import Batch, Blocks, Coded, DataSpec, Losses, Quantized, View, Window
from vqcore.registry import Registry, registry
from vqcore.schema import TokenizerConfig
from vqcore.testing import checks, conformance
from vqcore.testing.basics import MisspeltMember, misspelt_members, noise
from vqcore.testing.files import TEXT_WAIVABLE
from vqcore.testing.quantizers import WAIVABLE
from vqcore.testing.runs import OBJECTIVE_WAIVABLE, SCHEDULER_WAIVABLE, as_run
from vqcore.testing.samples import METRIC_WAIVABLE, MODALITY_WAIVABLE
from vqcore.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SPEC = DataSpec(channels=2, size=(8, 8))
X = noise(3, 2, 8, 8)
Z = noise(3, 2, 2, 6)


def variant(cls, **members):
    """A class that is like another one but for some members."""
    return type(f"Odd{cls.__name__}", (cls,), members)


def linear(inputs, outputs, seed):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


# Good toys


class Encoder(nn.Module):
    dim = 6

    def __init__(self, seed=0):
        super().__init__()
        self.net = linear(2 * 16, 6, seed)
        self.register_buffer("calls", torch.zeros(()))

    def grid(self, size):
        for side in size:
            if side % 4:
                raise ValueError(f"side {side} is no multiple of the patch 4")
        return tuple(side // 4 for side in size)

    def patches(self, x):
        return rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=4, q=4)

    def forward(self, x):
        return self.net(self.patches(x))


class Decoder(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.net = linear(6, 2 * 16, seed)
        self.register_buffer("calls", torch.zeros(()))

    @property
    def last_layer(self):
        return self.net.weight

    def forward(self, z_q):
        return rearrange(self.net(z_q), "b h w (c p q) -> b c (h p) (w q)", p=4, q=4)


class Denoiser(nn.Module):
    is_denoiser = True

    def __init__(self, seed=0):
        super().__init__()
        self.net = linear(2 + 6, 2, seed)

    @property
    def last_layer(self):
        return self.net.weight

    def condition(self, z_q, *, size, mask=None, extras=None):
        if mask is not None:
            z_q = z_q.masked_fill(mask.unsqueeze(-1), 0.0)
        return repeat(z_q, "b h w d -> b d (h p) (w q)", p=size[0] // z_q.shape[1], q=size[1] // z_q.shape[2])

    def forward(self, x_t, t, cond):
        both = torch.cat([x_t * (1 + t.view(-1, 1, 1, 1) / 1000), cond], 1)
        return rearrange(self.net(rearrange(both, "b c h w -> b h w c")), "b h w c -> b c h w")

    def to_target(self, x, rng):
        return x

    def from_target(self, y, size):
        return y

    def target_shape(self, size):
        return (2, *size)


class Quantizer(nn.Module):
    dim, codebook_size, num_codebooks = 3, 8, 1

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("book", torch.randn(8, 3))

    def nearest(self, z):
        return (z.unsqueeze(-2) - self.book).square().sum(-1).argmin(-1)

    def forward(self, z, mask=None):
        z = z.float()
        codes = self.nearest(z)
        z_q = self.book[codes]
        valid = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask
        commit = (z - z_q)[valid].square().mean()
        if self.training:
            self.book += 0.0
            z_q = z + (z_q - z).detach()
        return Quantized(z_q, codes.unsqueeze(-1), {"vq/commit": commit}, {"vq/ones": torch.ones(())})

    def decode(self, codes):
        if codes.numel() and int(codes.max()) >= 8:
            raise ValueError(f"code {int(codes.max())} lies outside of [0, 8)")
        return self.book[codes[..., 0]]


class Fitted(Quantizer):
    """Its book is learned by `fit`: the first eight valid latents."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.book.zero_()
        self.register_buffer("fitted", torch.tensor(False))

    def check(self):
        if not self.fitted:
            raise ConfigError("fit me first")

    def forward(self, z, mask=None):
        self.check()
        return super().forward(z, mask)

    def decode(self, codes):
        self.check()
        return super().decode(codes)

    def rows(self, latents):
        return torch.cat([z.flatten(0, -2) if mask is None else z[mask] for z, mask in latents])

    def fit(self, latents, rng):
        self.book.copy_(self.rows(latents)[:8])
        self.fitted.fill_(True)
        return {"centres": "8"}


class Percept(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear(2, 4, 0).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def features(self, x):
        return torch.tanh(self.net(rearrange(x, "b c h w -> b h w c")))

    def forward(self, x_hat, x):
        return (self.features(x_hat) - self.features(x)).square().flatten(1).mean(1)


class Discriminator(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.net = linear(2, 1, seed)

    def forward(self, x):
        return self.net(rearrange(x, "b c h w -> b h w c"))


class Rival(nn.Module):
    """An adversary."""

    start = 0

    def __init__(self, seed=0):
        super().__init__()
        self.net = linear(2, 1, seed)

    def logits(self, x):
        return self.net(rearrange(x, "b c h w -> b h w c"))

    def generator(self, x_hat, x, *, mask, step, rng, against=None, last_layer=None):
        return Losses({"gan/generator": -self.logits(x_hat).mean()})

    def discriminator(self, x_hat, x, *, mask, step, rng):
        real, fake = self.logits(x), self.logits(x_hat)
        return Losses({"gan/discriminator": (1 - real).square().mean() + (1 + fake).square().mean()})


class Borrower(nn.Module):
    """Borrows a network from a file."""

    borrowed = ("net",)

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 3)

    def borrow(self, places):
        if "net" not in places:
            raise CheckpointError("no place")
        tensors, digest = read(places["net"])
        self.net.load_state_dict(tensors)
        return {"net": digest}


class Teacher(nn.Module):
    dim = 5

    def __init__(self):
        super().__init__()
        self.net = linear(2, 5, 0).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return rearrange(self.net(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


def cosine(t):
    return torch.cos(torch.as_tensor(t, dtype=torch.float64) / 1000 * 1.5).float()


class Scheduler:
    """Predicts eps; DDIM from the cosine schedule (arXiv 2010.02502, eq. 12 without noise)."""

    num_steps = 1000

    def mix(self, x, eps, t):
        a = cosine(t).view(-1, *[1] * (x.ndim - 1))
        return a * x + (1 - a**2).clamp(min=0).sqrt() * eps

    def add_noise(self, x, eps, t):
        return self.mix(x, eps, t)

    def target(self, x, eps, t):
        return eps

    def sampler(self, steps):
        return Sampler(steps)


class Sampler:
    def __init__(self, steps):
        self.timesteps = [900 - 900 * k // steps for k in range(steps)]

    def step(self, prediction, t, x_t, rng):
        after = [s for s in self.timesteps if s < t]
        a, b = cosine(t), cosine(max(after)) if after else torch.ones(())
        x = (x_t - (1 - a**2).sqrt() * prediction) / a
        return b * x + (1 - b**2).sqrt() * prediction


class Modality:
    """Arrays (2, h, w) within -1..1."""

    suffixes = (".npy",)
    metrics = ("mae",)

    def __init__(self, **changes):
        self.spec = dataclasses.replace(SPEC, **changes)

    def read(self, source, at_least=None):
        try:
            raw = source if isinstance(source, np.ndarray) else np.load(source)
        except ValueError as error:
            raise DataError(str(error)) from error
        if not np.isfinite(raw).all():
            raise DataError("holds NaN")
        return raw

    def extent(self, raw):
        return raw.shape[1:]

    def view(self, extent, size, rng):
        whole = View((0.0, 0.0), (1.0, 1.0), size)
        return whole if rng is None else dataclasses.replace(whole, flip=bool(rng.random() < 0.5))

    def tensor(self, raw, view):
        x = F.interpolate(torch.from_numpy(raw).float().unsqueeze(0), size=view.size, mode="area")[0]
        return x.flip(-1) if view.flip else x

    def mask(self, raw, view):
        return torch.ones(view.size, dtype=torch.bool)

    def values(self, x):
        return x.float() * 10

    def show(self, x):
        return x.numpy()

    def picture(self, x):
        return Image.new("RGB", (4, 4))


class Streaming(Modality):
    """Reads open files as well."""

    streams = (".npy",)

    def read(self, source, at_least=None):
        if hasattr(source, "seek"):
            source.seek(0)
        return super().read(source)


class Writing(Modality):
    """Writes what it shows itself."""

    written = ".npy"

    def write(self, shown, path):
        np.save(path, shown)


class Finishing(Modality):
    """Makes the raw tensor twice as large and lets a frozen network have the last word."""

    def __init__(self, **changes):
        super().__init__(**changes)
        self.net = linear(2, 2, 0)

    def tensor(self, raw, view):
        return super().tensor(raw, dataclasses.replace(view, size=tuple(2 * side for side in view.size)))

    def finish(self, x):
        half = rearrange(F.avg_pool2d(x, 2), "b c h w -> b h w c")
        return rearrange(torch.tanh(self.net(half)), "b h w c -> b c h w")


class Riding(Modality):
    """Half as large beside another modality, and says what its reading and its positions are worth."""

    reading = ("raw",)

    def ride(self, view, main):
        return dataclasses.replace(view, size=tuple(side // 2 for side in view.size))

    def weight(self, raw, view):
        return torch.ones(view.size)


class Cutting(Modality):
    """Takes windows of 4 rows and 8 columns, and knows its extent from the shape."""

    sizing = ("window", "window")
    fill = -1.0

    def __init__(self, **changes):
        super().__init__(**{"size": (4, 8), **changes})

    def extent_of(self, source):
        return source.shape[1:]

    def view(self, extent, size, rng):
        return view_of(sized_box(extent, size, self.sizing, rng), extent, size)

    def tensor(self, raw, view):
        (top, left), (bottom, right) = pixels(view, raw.shape[1:])
        return torch.from_numpy(raw[:, round(top) : round(bottom), round(left) : round(right)].copy()).float()


class Halving(Modality):
    """Reads for training what it would make of a sample anyway."""

    def read(self, source, at_least=None):
        raw = super().read(source)
        if at_least is None:
            return raw
        return raw, F.avg_pool2d(torch.from_numpy(raw)[None], raw.shape[1] // at_least[0])[0].numpy()

    def extent(self, raw):
        return super().extent(raw[0] if isinstance(raw, tuple) else raw)

    def tensor(self, raw, view):
        return super().tensor(raw[1] if isinstance(raw, tuple) else raw, view)


SAMPLE = np.tanh(noise(2, 16, 16).numpy())


class Data:
    def __init__(self):
        self.samples = [np.tanh(noise(2, 8, 8, seed=seed).numpy()) for seed in range(6)]

    def __len__(self):
        return len(self.samples)

    def key(self, index):
        return f"part/{index:03}"

    def get(self, index, label=""):
        return self.samples[index]


class Windows(Data):
    """Each array is two samples: its upper and its lower half."""

    def __len__(self):
        return 2 * len(self.samples)

    def get(self, index, label=""):
        return Window(self.samples[index // 2], (4 * (index % 2), 0), (4 * (index % 2) + 4, 8))


class Tokenized(Data):
    """Samples with codes that were made before."""

    made: ClassVar = {"grid": [2, 2], "num_codebooks": 1, "codebook_size": 9}

    def coded(self, index):
        return Coded(self.key(index), np.full((2, 2, 1), index))


class Reader:
    suffixes = (".npy",)

    def read(self, path):
        try:
            return np.load(path)
        except (OSError, ValueError) as error:
            raise DataError(str(error)) from error


class Stored:
    def __init__(self, lines):
        self.lines = lines

    def __len__(self):
        return len(self.lines)

    def line(self, place):
        return self.lines[place]

    def codes(self, place):
        return np.array(self.line(place)[1])

    def key(self, place):
        return self.line(place)[0]

    def extras(self, place):
        return self.line(place)[2]

    def find(self, key):
        return {line[0]: place for place, line in enumerate(self.lines)}[key]

    def many(self, places):
        return np.stack([self.codes(place) for place in places])

    def keys(self):
        return pa.array([line[0].encode() for line in self.lines])


class Store:
    def write(self, folder, shard, rows, manifest):
        lines = [(row.key, row.codes.tolist(), row.extras) for row in rows]
        (folder / f"{shard}.json").write_text(json.dumps(lines))
        return [f"{shard}.json"]

    def open(self, folder, manifest):
        names = [name for shard in manifest["shards"] for name in shard["files"]]
        try:
            return Stored([line for name in names for line in json.loads((folder / name).read_text())])
        except (OSError, ValueError) as error:
            raise DataError(str(error)) from error


class Adopting(Store):
    """A layout of another system: a file of lines for each file, which no list names."""

    def write(self, folder, shard, rows, manifest):
        lines = {}
        for row in rows:
            lines.setdefault(row.extras.get("record", row.key), []).append(
                (row.key, row.codes.tolist(), row.extras)
            )
        for key, held in lines.items():
            self.path(folder, key).write_text(json.dumps(held))
        return [self.path(folder, key).name for key in lines]

    def open(self, folder, manifest):
        names = sorted(path.name for path in folder.iterdir())
        return Store.open(self, folder, {"shards": [{"files": names}]})

    def path(self, folder, key):
        return folder / f"{key.replace('/', '-')}.json"

    def held(self, folder, key, manifest):
        try:
            lines = json.loads(self.path(folder, key).read_text())
        except (OSError, ValueError):
            return None
        return [Coded(row_key, np.array(codes), extras) for row_key, codes, extras in lines]

    def views(self, folder, key, extent):
        return [] if self.path(folder, key).exists() else None


class Letters:
    vocab_size = 256

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return [bytes(one).decode() for one in ids]


class Spelling(Letters):
    """Learns which letters there are."""

    def __init__(self, file=None):
        self.letters = "" if file is None else self.read(file)
        self.vocab_size = len(self.letters)

    def read(self, file):
        try:
            found = Path(file).read_text()
        except OSError as error:
            raise DataError("missing") from error
        if "\0" in found:
            raise DataError("damaged")
        return found

    def encode(self, texts):
        return [[self.letters.index(letter) for letter in text if letter in self.letters] for text in texts]

    def decode(self, ids):
        return ["".join(self.letters[id] for id in one) for one in ids]

    def train(self, texts):
        self.letters = "".join(sorted({letter for text in texts for letter in text}))
        self.vocab_size = len(self.letters)

    def save(self, path):
        Path(path).write_text(self.letters)

    def pieces(self, ids):
        return [self.letters[id] for id in ids]

    def facts(self):
        return {"letters": self.letters}


class Metric(MAE):
    def __init__(self):
        super().__init__(self.Config(), spec=SPEC)


class Hook:
    entries: ClassVar[list] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Base):
        """Settings."""

    def __init__(self, cfg=None):
        pass

    @hookimpl
    def vqcore_step_ended(self, run, step, metrics):
        self.entries.append(step)


class Objective(Reconstruction):
    def __init__(self):
        super().__init__(self.Config(name="reconstruction"), spec=SPEC)


class Weighted(Encoder):
    """Keeps weights where no state dict sees them."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.hidden = noise(6, seed=seed + 7)

    def forward(self, x):
        return super().forward(x) + self.hidden


class RowMetric(MAE):
    """A metric that gives rows, with a network that `setup` makes and whose hash is a fact."""

    rows = True
    net = None

    def __init__(self, seed=0):
        super().__init__(MAE.Config(), spec=SPEC)

    def setup(self, device):
        self.net = linear(1, 1, 0).double().to(device)

    def facts(self):
        return {"net": f"{self.net.weight.item():.6f}"}

    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        return {"off": per_sample((x_hat.double() - x).abs(), mask, weight)}

    def summary(self, sums):
        return {"": float(sums["off"] / sums["count"])}


class GatheringMetric(RowMetric):
    """A metric that needs all rows at once: the median."""

    gather = True

    def summary(self, sums):
        return {"": float(sums["off"].median())}


# How each kind is checked


def encoder(made):
    checks.check_encoder(made, X.clone(), fresh=type(made)(1) if isinstance(made, nn.Module) else None)


def decoder(made):
    fresh = type(made)(1) if isinstance(made, nn.Module) else None
    checks.check_decoder(made, Z, (3, 2, 8, 8), fresh=fresh)


def denoiser(made):
    fresh = type(made)(1) if isinstance(made, nn.Module) else None
    checks.check_denoiser(made, Z, (3, 2, 8, 8), fresh=fresh)


def percept(made):
    checks.check_percept(made, X.clone(), X + 0.3 * noise(3, 2, 8, 8, seed=5))


def discriminator(made):
    checks.check_discriminator(made, X.clone())


def adversary(made):
    fresh = type(made)(1) if isinstance(made, nn.Module) else None
    checks.check_adversary(made, X + 0.3 * noise(3, 2, 8, 8, seed=5), X.clone(), fresh=fresh)


def borrower(made):
    """`made` is a module that borrows; fresh ones are built from its class."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        save_file({"weight": noise(3, 2), "bias": noise(3)}, path)
        checks.check_borrowed(type(made), {"net": str(path)})


def teacher(made):
    checks.check_teacher(made, X.clone())


def modality(made):
    checks.check_modality(made, SAMPLE)


def filed(made):
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "a.npy", SAMPLE)
        checks.check_modality(made, Path(folder) / "a.npy")


def data(made):
    checks.check_data(made, Modality())


def reader(made):
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "a.npy", SAMPLE)
        checks.check_reader(made, Path(folder) / "a.npy")


def adopting(made):
    checks.check_store(made, waived={"missing": "the files that are there are the store"})


def text(made):
    checks.check_text(made, ("a cat", "", "two cats"))


def learning(make):
    checks.check_learning(make, ("a cat", "", "two cats"))


def metric(made):
    checks.check_metric(made, SPEC)


GOOD = {
    "encoder": (encoder, Encoder),
    "decoder": (decoder, Decoder),
    "denoiser": (denoiser, Denoiser),
    "quantizer": (checks.check_quantizer, Quantizer),
    "percept": (percept, Percept),
    "discriminator": (discriminator, Discriminator),
    "adversary": (adversary, Rival),
    "teacher": (teacher, Teacher),
    "scheduler": (checks.check_scheduler, Scheduler),
    "modality": (modality, Modality),
    "streaming": (filed, Streaming),
    "reader": (reader, Reader),
    "data": (data, Data),
    "store": (checks.check_store, Store),
    "layout": (adopting, Adopting),
    "text": (text, Letters),
    "metric": (metric, Metric),
    "hook": (checks.check_hook, Hook),
}


@pytest.mark.parametrize("cls", [RowMetric, GatheringMetric])
def test_good_metrics_that_give_rows_pass(cls):
    metric(cls())


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_one_of_each_kind_passes(kind):
    check, cls = GOOD[kind]
    check(cls())


# Bad toys: how a law is broken, and what the kit must say


def times_calls(self, x):
    self.calls += 1
    return type(self).__mro__[1].forward(self, x) * self.calls


def count_calls(self, *args):
    self.calls += 1
    return type(self).__mro__[1].forward(self, *args)


def spoil(self, x):
    y = type(self).__mro__[1].forward(self, x)
    x.mul_(2)
    return y


def centred(self, x):
    y = type(self).__mro__[1].forward(self, x)
    return y - y.mean(0, keepdim=True)


def infinite(self, x):
    return type(self).__mro__[1].forward(self, x) / 0.0


def coarse(self, x):
    y = type(self).__mro__[1].forward(self, x)
    return y * 2 if torch.is_autocast_enabled("cpu") else y


def dead(self, x):
    return type(self).__mro__[1].forward(self, x).detach() + 0 * sum(p.sum() for p in self.parameters())


class Idle(Encoder):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.idle = nn.Parameter(torch.ones(2))


class IdleDecoder(Decoder):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.idle = nn.Parameter(torch.ones(2))


class IdleDenoiser(Denoiser):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.idle = nn.Parameter(torch.ones(2))


class IdleDiscriminator(Discriminator):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.idle = nn.Parameter(torch.ones(2))


class HiddenDenoiser(Denoiser):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.hidden = noise(1, 2, 1, 1, seed=seed)

    def forward(self, x_t, t, cond):
        return super().forward(x_t, t, cond) + self.hidden


def clamps(self, x):
    return type(self).__mro__[1].forward(self, x.clamp_(-0.5, 0.5))


class Cropping(Encoder):
    """Takes any size, and says that it makes more of it than it does."""

    def grid(self, size):
        return tuple(-(-side // 4) for side in size)

    def patches(self, x):
        return super().patches(x[:, :, : x.shape[2] // 4 * 4, : x.shape[3] // 4 * 4])


class Twice(Decoder):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.register_buffer("copy_last_layer", torch.ones(2))


class Grown(Quantizer):
    """Its codebook moves in training, for all positions."""

    def forward(self, z, mask=None):
        out = super().forward(z, mask)
        if self.training:
            self.book += 0.001 * z.mean()
        return out


class HiddenBook(Quantizer):
    """What the training learns is no state."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.shift = torch.zeros(3)

    def forward(self, z, mask=None):
        if self.training:
            self.shift = self.shift + 5.0
        return super().forward(z + self.shift, mask)


def refuse_with(text):
    def grid(self, size):
        for side in size:
            if side % 4:
                raise ValueError(text)
        return tuple(side // 4 for side in size)

    return grid


def grid_raises(self, size):
    for side in size:
        if side % 4:
            raise KeyError(side)
    return tuple(side // 4 for side in size)


def changed_codes(change):
    def forward(self, z, mask=None):
        out = Quantizer.forward(self, z, mask)
        return change(self, out, z)

    return forward


def replaced(record, **changes):
    """The record without the checks of shapes that tests make: those of others are not run with them."""
    return SimpleNamespace(**{**vars(record), **changes})


def with_codes(self, out, z, codes):
    return replaced(out, codes=codes)


QUANTIZERS = {
    "shape law: codes are": lambda s, o, z: with_codes(s, o, z, o.codes[..., 0]),
    "shape law: z_q is": lambda s, o, z: replaced(o, z_q=o.z_q[..., :2]),
    "codes are torch.int32": lambda s, o, z: with_codes(s, o, z, o.codes.int()),
    "range law: codes": lambda s, o, z: with_codes(s, o, z, o.codes + 8),
    "inverse law": lambda s, o, z: replaced(o, z_q=o.z_q + 0.5),
    "names law: losses are": lambda s, o, z: replaced(o, losses=o.losses if s.training else {}),
    "names law: metrics are": lambda s, o, z: replaced(o, metrics={} if s.training else o.metrics),
    "is not a scalar": lambda s, o, z: replaced(o, losses={"vq/commit": z.mean(-1)}),
    "names law: vq/ones is nan": lambda s, o, z: replaced(o, metrics={"vq/ones": torch.tensor(float("nan"))}),
    "gradient law: no gradient at z": lambda s, o, z: (
        replaced(o, z_q=o.z_q + 0 * z.sum() / 0 * s.training) if s.training else o
    ),
    "gradient law: the gradient that reaches z is zero": lambda s, o, z: (
        replaced(o, z_q=o.z_q.detach() + 0 * z) if s.training else o
    ),
    "mask law: invalid positions change vq/commit": lambda s, o, z: replaced(
        o, losses={"vq/commit": z.square().mean()}
    ),
}


def batch_codes(self, z, mask=None):
    return Quantizer.forward(self, z - z.mean(0, keepdim=True) * 3, mask)


def shifted_codes(self, z, mask=None):
    """Depends on the position."""
    steps = torch.arange(z.shape[1], dtype=z.dtype).view(1, -1, *[1] * (z.ndim - 2))
    return Quantizer.forward(self, z + 3 * steps, mask)


def moved_latents(self, z, mask=None):
    return Quantizer.forward(self, z * -1.5, mask)


def masked_codes(self, z, mask=None):
    return Quantizer.forward(self, z if mask is None else -z, mask)


def counts_in_eval(self, z, mask=None):
    self.book[:] = self.book + 0.01
    return Quantizer.forward(self, z, mask)


def no_bfloat(self, z, mask=None):
    out = Quantizer.forward(self, z, mask)
    return out if z.dtype == torch.float32 else dataclasses.replace(out, codes=out.codes.short())


def under_autocast(self, z, mask=None):
    out = Quantizer.forward(self, z, mask)
    return dataclasses.replace(out, codes=0 * out.codes) if torch.is_autocast_enabled("cpu") else out


def nan_in_bfloat(self, z, mask=None):
    out = Quantizer.forward(self, z, mask)
    return out if z.dtype == torch.float32 else dataclasses.replace(out, z_q=out.z_q / 0)


def silent_decode(self, codes):
    return self.book[codes[..., 0] % 8]


def full_decode(self, codes):
    if int(codes.max()) >= 8:
        raise ValueError("a code is outside of [0, 8)")
    return self.book[codes[..., 0]]


def flat_if_empty(self, z, mask=None):
    out = Quantizer.forward(self, z, mask)
    return out if len(z) else replaced(out, codes=out.codes.flatten())


def unbounded_decode(self, codes):
    if codes.numel() and int(codes.max()) >= 8:
        raise ValueError("too large")
    return self.book[codes[..., 0]]


class Remembering(Sampler):
    """Forgets nothing from one sampler to the next."""

    noise: ClassVar[list] = []

    def step(self, prediction, t, x_t, rng):
        self.noise.append(t)
        return super().step(prediction, t, x_t, rng) + 1e-3 * len(self.noise)


class Rising(Sampler):
    def __init__(self, steps):
        super().__init__(steps)
        self.timesteps = self.timesteps[::-1]


class Lost(Sampler):
    def step(self, prediction, t, x_t, rng):
        return super().step(prediction, t, x_t, rng) + 0.2


class Mixing(Sampler):
    def step(self, prediction, t, x_t, rng):
        y = super().step(prediction, t, x_t, rng)
        return y + 0.1 * y.mean(0, keepdim=True)


class Exploding(Sampler):
    def step(self, prediction, t, x_t, rng):
        return x_t * float("inf")


class Stepless(Sampler):
    def __init__(self, steps):
        self.timesteps = []


def sampled_by(cls):
    return lambda self, steps: cls(steps)


def timed_by(law):
    return variant(Scheduler, time=lambda self, u: law(u))


def coarse_in_floats(self, x, eps, t):
    return self.mix(x, eps, t if t.is_floating_point() else t // 500 * 500)


def drawing(self, x, eps, t):
    return self.mix(x, eps, t) + 0.01 * torch.randn_like(x)


def noisy_in_place(self, x, eps, t):
    return self.mix(x, eps.clamp_(-1, 1), t)


class View2(Modality):
    def view(self, extent, size, rng):
        return dataclasses.replace(super().view(extent, size, rng), size=(4, 4))


class Wandering(Modality):
    turn = 0

    def view(self, extent, size, rng):
        self.turn += 1
        return dataclasses.replace(super().view(extent, size, rng), start=(0.01 * self.turn, 0.0))


class Global(Modality):
    """Draws from NumPy's global generator."""

    turn = 0

    def view(self, extent, size, rng):
        self.turn += rng is not None
        return dataclasses.replace(super().view(extent, size, rng), start=(0.01 * self.turn, 0.0))


class Outside(Modality):
    def view(self, extent, size, rng):
        return dataclasses.replace(super().view(extent, size, rng), stop=(1.5, 1.0))


class Drawing(Modality):
    """Hides what it drew behind the last axis."""

    def view(self, extent, size, rng):
        view = super().view(extent, size, rng)
        return dataclasses.replace(view, start=(*view.start, 0.5), stop=(*view.stop, 1.0))


def tensor_of(change, **members):
    return variant(
        Modality, tensor=lambda self, raw, view: change(Modality.tensor(self, raw, view)), **members
    )


def one_channel_less(self, raw, view):
    x = Halving.tensor(self, raw, view)
    return x[:1] if isinstance(raw, tuple) else x


class Flickering(Modality):
    turn = 0

    def tensor(self, raw, view):
        self.turn += 1
        return Modality.tensor(self, raw, view) + 1e-3 * self.turn


class FixedSize(Modality):
    def tensor(self, raw, view):
        return super().tensor(raw, dataclasses.replace(view, size=(8, 8)))


class Sloping(Modality):
    """Moves where it should mirror."""

    def tensor(self, raw, view):
        x = Modality.tensor(self, raw, dataclasses.replace(view, flip=False))
        return x.roll(1, -1) if view.flip else x


def finished(change):
    return variant(Finishing, finish=lambda self, x: change(Finishing.finish(self, x), x))


class Clipping(Modality):
    """Changes what `read` returned, which other labels may use."""

    def read(self, source, at_least=None):
        return super().read(source).copy()

    def tensor(self, raw, view):
        return super().tensor(np.clip(raw, -0.5, 0.5, out=raw), view)


class Undecided(Modality):
    turn = 0

    @property
    def reading(self):
        self.turn += 1
        return self.turn


class Labels(Modality):
    """Class maps; `ids` says what a tensor holds."""

    def __init__(self, ids):
        super().__init__(kind="categorical", labels=4)
        self.ids = ids

    def tensor(self, raw, view):
        return self.ids.expand(*view.size)


def trusting(self, source, at_least=None):
    return source if isinstance(source, np.ndarray) else SAMPLE


def negated(self, source, at_least=None):
    raw = Streaming.read(self, source)
    return -raw if hasattr(source, "seek") else raw


def trusting_streams(self, source, at_least=None):
    return SAMPLE if hasattr(source, "seek") else Modality.read(self, source)


def trusting_less(self, source, at_least=None):
    return Modality.read(self, source) if at_least is None else (trusting(self, source), SAMPLE)


def in_less_detail(change):
    return lambda self, source, at_least=None: (change if at_least else lambda raw: raw)(
        Modality.read(self, source)
    )


def crashing(self, source, at_least=None):
    return source if isinstance(source, np.ndarray) else np.load(source)


def nan_reader(self, source, at_least=None):
    return (
        np.load(source)
        if isinstance(source, str)
        else source
        if isinstance(source, np.ndarray)
        else Modality.read(self, source)
    )


def coded(codes):
    """Samples that all have these codes."""
    return variant(Tokenized, coded=lambda self, index: Coded(self.key(index), codes))


def keyed(key):
    return variant(Data, key=lambda self, index: key(index))


class Restless(Data):
    turn = 0

    def get(self, index, label=""):
        self.turn += 1
        return self.samples[index] / self.turn


class Forgetful(Data):
    """Loses its order on the way to a worker."""

    def __getstate__(self):
        return {"samples": self.samples[::-1]}


class Shrinking(Data):
    def __getstate__(self):
        return {"samples": self.samples[:-1]}


class Renaming(Data):
    prefix = "a"

    def key(self, index):
        return f"{self.prefix}{index}"

    def __getstate__(self):
        return {"samples": self.samples, "prefix": "b"}


def stored(**members):
    """A store whose opened folder is odd."""
    odd = variant(Stored, **members)
    return variant(Store, open=lambda self, folder, manifest: odd(Store.open(self, folder, manifest).lines))


TICKS = iter(range(1000))


REMEMBERED: dict[str, list] = {}


def from_memory(self, folder, key, manifest):
    """Rows that the file no longer has."""
    found = Adopting.held(self, folder, key, manifest)
    return REMEMBERED.setdefault(key, found) if found else REMEMBERED.get(key)


def careless_open(self, folder, manifest):
    return Stored(
        [
            line
            for shard in manifest["shards"]
            for line in json.loads((folder / shard["files"][0]).read_text())
        ]
    )


def numbered_write(self, folder, shard, rows, manifest):
    """Bytes that a clock decides."""
    Store.write(self, folder, shard, rows, manifest)
    path = folder / f"{shard}.json"
    path.write_text(path.read_text() + " " * next(TICKS))
    return [path.name]


def spelt(encode=lambda found: found, decode=lambda found: found):
    return variant(
        Letters,
        encode=lambda self, texts: encode(Letters.encode(self, texts)),
        decode=lambda self, ids: decode(Letters.decode(self, ids)),
    )


def looked_into(**changed):
    def make():
        made = speller(**changed)()()
        made.train(("a cat", "two cats"))
        return made

    return make


def speller(**changed):
    """A function that gives a class, whose instances learn."""
    return lambda: type("Speller", (Spelling,), changed)


def crashing_reader(self, path):
    return np.load(path)


PARTS = {"many": False, "parts": lambda self, path: ("a", "a"), "Config": Base}
"""A reader that names one part twice."""


def numbered(self, path, turn=[0]):  # noqa: B006
    turn[0] += 1
    return Reader.read(self, path) + turn[0]


def shyly(self, path, turn=[0]):  # noqa: B006
    turn[0] += 1
    found = Reader.read(self, path)
    return np.ma.MaskedArray(found, np.arange(found.size).reshape(found.shape) == turn[0])


def measured(change):
    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        return change(MAE.measure(self, x_hat, x, mask, weight=weight), x_hat, x)

    return variant(Metric, measure=measure)


class MaskBlind(Metric):
    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        return super().measure(x_hat, x, weight=weight)


class MaskTouchy(Metric):
    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        sums = super().measure(x_hat, x, mask, weight=weight)
        return sums if mask is None else {**sums, "sum": sums["sum"] + 1}


class Spoiling(Metric):
    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        sums = super().measure(x_hat, x, mask, weight=weight)
        x_hat.zero_()
        return sums


def keyless(self, x_hat, x, mask=None):
    return MAE.measure(self, x_hat, x, mask)


def weighing(change):
    """A metric that gets other weights than those given."""

    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        return MAE.measure(self, x_hat, x, mask, weight=None if weight is None else change(weight))

    return variant(Metric, measure=measure)


def doubled(self, x_hat, x, mask=None, *, keys=(), weight=None):
    sums = MAE.measure(self, x_hat, x, mask, weight=weight)
    return sums if weight is None else {**sums, "sum": 2 * sums["sum"]}


def per_row(change):
    def measure(self, x_hat, x, mask=None, *, keys=(), weight=None):
        return change(RowMetric.measure(self, x_hat, x, mask, keys=keys, weight=weight))

    return variant(RowMetric, measure=measure)


def summed(change):
    return variant(Metric, summary=lambda self, sums: change(MAE.summary(self, sums)))


class Misspelt:
    @hookimpl
    def vqcore_step_endet(self, step): ...


class WrongArgument:
    @hookimpl
    def vqcore_step_ended(self, loss): ...


class Unmarked(Hook):
    def vqcore_saved(self, step): ...


class Deaf:
    pass


class TwiceTarget(Denoiser):
    def to_target(self, x, rng):
        return x + torch.randn_like(x)


def hidden_in(where):
    """A condition that lets hidden tokens through: `all`, or when only some are hidden (`some`)."""

    def condition(self, z_q, *, size, mask=None, extras=None):
        if mask is not None and (where == "all") == bool(mask.all()):
            mask = torch.zeros_like(mask)
        return Denoiser.condition(self, z_q, size=size, mask=mask, extras=extras)

    return condition


def touchy_condition(self, z_q, *, size, mask=None, extras=None):
    return Denoiser.condition(self, z_q if mask is None else 2 * z_q, size=size, mask=mask)


def empty_condition(self, z_q, *, size, mask=None, extras=None):
    return Denoiser.condition(self, 0 * z_q, size=size, mask=mask)


def predicted(change):
    return variant(Denoiser, forward=lambda self, x, t, c: change(Denoiser.forward(self, x, t, c)))


def unfrozen(cls):
    made = cls()
    made.net.requires_grad_(True)
    return made


def losing(terms, turn="generator"):
    """An adversary whose turn has other losses."""

    def losses(self, x_hat, x, **more):
        return replaced(Losses({}), terms=terms(self, x_hat, x))

    return variant(Rival, **{turn: losses})


class CountingRival(Rival):
    """Counts in evaluation."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.register_buffer("seen", torch.zeros(()))

    def logits(self, x):
        self.seen += 1
        return super().logits(x)


class IdleRival(Rival):
    """Has a parameter that no loss uses."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.idle = nn.Parameter(torch.ones(2))


class HiddenRival(Rival):
    """Keeps a weight where no state dict sees it."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.hidden = noise(1, seed=seed + 7)

    def logits(self, x):
        return super().logits(x) * self.hidden


class PlainRival:
    """An adversary that is no module."""

    start = 0
    generator, discriminator = Rival.generator, Rival.discriminator


class Misnamed(Borrower):
    borrowed = ("nett",)


class Unfilled(Borrower):
    """Reads the file and leaves its network as it was."""

    def borrow(self, places):
        return {"net": read(places.get("net", "nowhere"))[1]}


class Placeless(Borrower):
    """Has no answer where no place is given."""

    def borrow(self, places):
        return {"net": read(places["net"])[1]}


class Fickle(Borrower):
    """Its hash is another one every time."""

    def borrow(self, places):
        return {"net": sha256({"a": torch.rand(3)})}


class TwoNames(Borrower):
    """Holds its network under two names."""

    def __init__(self):
        super().__init__()
        net = self._modules.pop("net")
        self.again = nn.ModuleList([net])
        self.net = net


def nothing():
    return object()


def unready(self):
    if not self.fitted:
        raise RuntimeError("no book")


def spoils_latents(self, latents, rng):
    made = Fitted.fit(self, latents, rng)
    for z, _ in latents:
        z.add_(1)
    return made


def tells_numbers(self, latents, rng):
    Fitted.fit(self, latents, rng)
    return {"centres": 8}


def forgets_to_say(self, latents, rng):
    made = Fitted.fit(self, latents, rng)
    self.fitted.fill_(False)
    return made


def all_rows(self, latents):
    return torch.cat([z.flatten(0, -2) for z, _ in latents])


BAD = [
    *((check, nothing, "protocol law: object lacks") for kind, (check, _) in GOOD.items() if kind != "hook"),
    # encoder
    (encoder, variant(Encoder, dim=7), "shape law: latents are"),
    (encoder, variant(Encoder, forward=infinite), "finite law: the output"),
    (encoder, variant(Encoder, forward=times_calls), "determinism law: two calls"),
    (encoder, variant(Encoder, forward=centred), "batch law: a sample's latents"),
    (encoder, variant(Encoder, forward=spoil), "determinism law|purity law"),
    (encoder, variant(Encoder, forward=count_calls), "state law: eval changes no state"),
    (encoder, variant(Encoder, forward=coarse), "bf16 law"),
    (encoder, variant(Encoder, grid=refuse_with("no such size")), "grid law: .* without both numbers"),
    (encoder, variant(Encoder, grid=grid_raises), "grid law: .* raises KeyError"),
    (encoder, variant(Encoder, grid=lambda s, size: tuple(n // 4 for n in size)), "grid law: .* cannot take it"),
    (encoder, variant(Encoder, interpolated=("place",)), "state law: interpolated names place"),
    (encoder, Idle, "gradient law: no gradient reaches idle"),
    (encoder, Weighted, "state law: the result differs after"),
    (encoder, variant(Encoder, forward=clamps), "purity law"),
    (encoder, Cropping, "grid law: .* but the latents are"),
    (encoder, variant(Encoder, fetch="weights"), "protocol law: fetch of OddEncoder is not a method"),
    (encoder, variant(Encoder, grid=4), "protocol law: grid of OddEncoder is not a method"),
    (encoder, variant(Encoder, without_decay=("rows",)), "protocol law: without_decay names rows"),
    # decoder
    (decoder, variant(Decoder, forward=lambda s, z: Decoder.forward(s, z)[..., :7]), "shape law: the output"),
    (decoder, variant(Decoder, forward=centred), "batch law: a sample's output"),
    (decoder, variant(Decoder, forward=coarse), "bf16 law"),
    (decoder, Twice, "second name in the state dict"),
    (decoder, variant(Decoder, last_layer=nn.Parameter(torch.ones(2))), "no gradient reaches last_layer"),
    (decoder, IdleDecoder, "gradient law: no gradient reaches idle"),
    (decoder, variant(Decoder, forward=count_calls), "state law: eval changes no state"),
    # denoiser
    (denoiser, variant(Denoiser, is_denoiser="yes"), "is_denoiser is not True"),
    (denoiser, variant(Denoiser, target_shape=lambda s, size: (4, *size)), "target law: to_target gives"),
    (denoiser, TwiceTarget, "target law: to_target has another source"),
    (denoiser, variant(Denoiser, from_target=lambda s, y, size: y[:, :1]), "target law: from_target gives"),
    (denoiser, variant(Denoiser, from_target=lambda s, y, size: y / 0), "finite law: from_target"),
    (denoiser, predicted(lambda y: y[:, :1]), "shape law: the prediction"),
    (denoiser, predicted(lambda y: y / 0), "finite law: the prediction"),
    (denoiser, predicted(lambda y: y + torch.rand(())), "determinism law"),
    (denoiser, predicted(lambda y: y - y.mean(0)), "batch law: a sample's prediction"),
    (denoiser, variant(Denoiser, condition=empty_condition), "does not depend on z_q"),
    (denoiser, variant(Denoiser, condition=touchy_condition), "a mask of all False changes"),
    (denoiser, variant(Denoiser, condition=hidden_in("some")), "a hidden token changes"),
    (denoiser, variant(Denoiser, condition=hidden_in("all")), "with all tokens hidden"),
    (denoiser, IdleDenoiser, "gradient law: no gradient reaches idle"),
    (denoiser, predicted(lambda y: y * 2 if torch.is_autocast_enabled("cpu") else y), "bf16 law"),
    (denoiser, HiddenDenoiser, "state law: the result differs after"),
    # quantizer
    *((checks.check_quantizer, variant(Quantizer, forward=changed_codes(c)), text) for text, c in QUANTIZERS.items()),
    (checks.check_quantizer, variant(Quantizer, forward=batch_codes), "batch law: a sample's codes"),
    (checks.check_quantizer, variant(Quantizer, forward=shifted_codes), "position law"),
    (checks.check_quantizer, variant(Quantizer, forward=moved_latents), "idempotence law"),
    (checks.check_quantizer, variant(Quantizer, forward=masked_codes), "a mask of all True changes codes"),
    (checks.check_quantizer, variant(Quantizer, forward=counts_in_eval), "eval changes no state"),
    (checks.check_quantizer, variant(Quantizer, forward=no_bfloat), "bf16 law: codes"),
    (checks.check_quantizer, variant(Quantizer, forward=nan_in_bfloat), "bf16 law: z_q"),
    (checks.check_quantizer, variant(Quantizer, codes_in_fp32="yes"), "fp32 law: codes_in_fp32 is 'yes'"),
    (checks.check_quantizer, variant(Quantizer, forward=under_autocast, codes_in_fp32=True), "fp32 law: .* have other"),
    (checks.check_quantizer, Grown, "invalid positions change the state"),
    (checks.check_quantizer, HiddenBook, "state law: codes differ|mask law|idempotence law"),
    (checks.check_quantizer, variant(Quantizer, decode=full_decode), "empty law: a batch without samples raises"),
    (checks.check_quantizer, variant(Quantizer, forward=flat_if_empty), "empty law: codes of no sample: the shape is"),
    (checks.check_quantizer, variant(Quantizer, decode=silent_decode), "bounds law: decode accepts code 8"),
    (checks.check_quantizer, variant(Quantizer, decode=unbounded_decode), "bounds law: the error does not"),
    (checks.check_quantizer, variant(Fitted, check=lambda self: None), "fit law: before fit, a call raises nothing"),
    (checks.check_quantizer, variant(Fitted, decode=Quantizer.decode), "fit law: before fit, decode raises nothing"),
    (checks.check_quantizer, variant(Fitted, check=unready), "fit law: before fit, a call raises RuntimeError"),
    (checks.check_quantizer, variant(Fitted, fit=spoils_latents), "purity law: fit changes the latents"),
    (checks.check_quantizer, variant(Fitted, fit=tells_numbers), "fit law: the fact centres is no text"),
    (checks.check_quantizer, variant(Fitted, fit=forgets_to_say), "fit law: fitted is not True after fit"),
    (checks.check_quantizer, variant(Fitted, rows=all_rows), "fit law: invalid positions, or a second fit, change"),
    # adversary
    (adversary, PlainRival, "players law: the adversary is no module"),
    (adversary, variant(Rival, start=-1), "start law: start is -1"),
    (adversary, variant(Rival, logits=lambda s, x: s.net(x.movedim(1, -1)) + torch.rand(())), "determinism law: two"),
    (adversary, losing(lambda s, y, x: {"gan/generator": -s.logits(y).mean() + torch.rand(())}),
     "determinism law: two calls of generator"),
    (adversary, CountingRival, "eval changes no state"),
    (adversary, losing(lambda s, y, x: {"gan/generator": -s.logits(y.detach()).mean()}),
     "gradient law: no gradient of generator"),
    (adversary, IdleRival, "gradient law: no gradient reaches idle"),
    (adversary, losing(lambda s, y, x: {"gan/generator": -s.logits(y).mean() / 0}), "finite law: gan/generator"),
    (adversary, HiddenRival, "state law: the result differs after"),
    (adversary, losing(lambda s, y, x: {"fool": -s.logits(y).mean()}), "names law: losses of generator are called"),
    (adversary, losing(lambda s, y, x: {"gan/d": s.logits(y).flatten(1).mean(1)}, "discriminator"),
     "names law: gan/d is not a scalar"),
    # borrowed weights
    (borrower, Placeless, "borrowing law: without a place, borrow raises KeyError"),
    (borrower, Misnamed, "borrowing law: borrowed names .'nett'., which is no submodule"),
    (borrower, Unfilled, "borrowing law: borrow does not fill net.weight"),
    (borrower, Fickle, "borrowing law: two modules with the same weights"),
    (borrower, TwoNames, r"borrowing law: again\.0\.\w+ is borrowed, and would be saved"),
    # percept
    (percept, lambda: unfrozen(Percept), "frozen law"),
    (percept, variant(Percept, forward=lambda s, a, b: Percept.forward(s, a, b).mean()), "shape law"),
    (percept, variant(Percept, forward=lambda s, a, b: Percept.forward(s, a, b) / 0), "finite law: the distance"),
    (percept, variant(Percept, forward=lambda s, a, b: -Percept.forward(s, a, b)), "law: the distance of different"),
    (percept, variant(Percept, forward=lambda s, a, b: Percept.forward(s, a, b) + 1), "law: the distance of a sample"),
    (percept, variant(Percept, forward=lambda s, a, b: Percept.forward(s, a.detach(), b) + 0 * a.sum()),
     "gradient law: the gradient at x_hat is zero"),
    (percept, variant(Percept, forward=lambda s, a, b: F.dropout(a - b).square().flatten(1).mean(1)),
     "determinism law"),
    (percept, variant(Percept, forward=lambda s, a, b: Percept.forward(s, a, b) * (1 + (a - b).square().mean())),
     "batch law"),
    (percept, variant(Percept, forward=count_calls), "a call changes no state"),
    (percept, variant(Percept, forward=lambda s, a, b: Percept.forward(s, a, b) + (0 * a).flatten(1).sqrt().sum(1)),
     "finite law: the gradient"),
    (percept, variant(Percept, forward=lambda s, a, b: Percept.forward(s, a.detach(), b)),
     "gradient law: no gradient reaches x_hat"),
    # discriminator
    (discriminator, variant(Discriminator, forward=lambda s, x: Discriminator.forward(s, x)[:2]),
     "batch law"),
    (discriminator, variant(Discriminator, forward=lambda s, x: Discriminator.forward(s, x).repeat_interleave(2, 0)),
     "shape law: 6 logits"),
    (discriminator, IdleDiscriminator, "gradient law: no gradient reaches idle"),
    (discriminator, variant(Discriminator, forward=centred), "batch law"),
    (discriminator, variant(Discriminator, forward=dead), "gradient law: no gradient reaches x"),
    (discriminator, variant(Discriminator, forward=lambda s, x: F.dropout(Discriminator.forward(s, x))),
     "determinism law"),
    # teacher
    (teacher, lambda: unfrozen(Teacher), "frozen law"),
    (teacher, variant(Teacher, dim=11), "shape law: features"),
    (teacher, variant(Teacher, forward=infinite), "finite law: features"),
    (teacher, variant(Teacher, forward=lambda s, x: F.dropout(Teacher.forward(s, x), 0.5, s.training)),
     "determinism law: .* training mode"),
    (teacher, variant(Teacher, forward=centred), "batch law"),
    (teacher, variant(Teacher, forward=clamps), "purity law"),
    (teacher, variant(Teacher, forward=count_calls), "a call changes no state"),
    # scheduler
    (checks.check_scheduler, variant(Scheduler, num_steps=0), "steps law"),
    (checks.check_scheduler, variant(Scheduler, add_noise=lambda s, x, e, t: s.mix(x, e, t)[:, :1]), "shape law"),
    (checks.check_scheduler, variant(Scheduler, target=lambda s, x, e, t: e / 0), "finite law: target"),
    (checks.check_scheduler, variant(Scheduler, add_noise=drawing), "purity law: two calls of add_noise"),
    (checks.check_scheduler, variant(Scheduler, add_noise=noisy_in_place), "purity law"),
    (checks.check_scheduler, variant(Scheduler, add_noise=lambda s, x, e, t: s.mix(x, e, t.flip(0))),
     "batch law"),
    (checks.check_scheduler, variant(Scheduler, add_noise=lambda s, x, e, t: s.mix(x, e, 999 - t)), "noise law"),
    (checks.check_scheduler, variant(Scheduler, add_noise=lambda s, x, e, t: s.mix(x, e, t).clamp(-1, 1) * t.ge(0)[0]),
     "affine law|noise law"),
    (checks.check_scheduler, variant(Scheduler, add_noise=lambda s, x, e, t: torch.tanh(s.mix(x, e, t))), "affine law"),
    (checks.check_scheduler, variant(Scheduler, add_noise=lambda s, x, e, t: s.mix(x, e, t) + 0.1), "affine law"),
    (checks.check_scheduler, variant(Scheduler, target=lambda s, x, e, t: e * e), "affine law: target"),
    (checks.check_scheduler, variant(Scheduler, target=lambda s, x, e, t: x.cumsum(-1)), "affine law: target"),
    (checks.check_scheduler, variant(Scheduler, target=lambda s, x, e, t: e * torch.arange(15.0).view(3, 5)),
     "affine law: OddScheduler has more than one factor"),
    (checks.check_scheduler, variant(Scheduler, add_noise=coarse_in_floats), "time law: add_noise takes t as"),
    (checks.check_scheduler, timed_by(lambda u: 1001 * u), "time law: .* from 0 to 1001, not inside"),
    (checks.check_scheduler, timed_by(lambda u: 999 * u - 1), "time law: .* from -1 to 998, not inside"),
    (checks.check_scheduler, timed_by(lambda u: 1000 * (1 - u)), "time law: a larger u has a smaller"),
    (checks.check_scheduler, timed_by(lambda u: 1000 * u.mean()), "time law: 37 numbers have"),
    (checks.check_scheduler, timed_by(lambda u: u / 0), "finite law: time"),
    (checks.check_scheduler, variant(Scheduler, time=0.5), "protocol law: time of OddScheduler is not a method"),
    (checks.check_scheduler, variant(Scheduler, sampler=sampled_by(Stepless)), "timesteps law: there are no"),
    (checks.check_scheduler, variant(Scheduler, sampler=sampled_by(Rising)), "timesteps law: .* do not fall"),
    (checks.check_scheduler, variant(Scheduler, sampler=sampled_by(Exploding)), "finite law: a walk"),
    (checks.check_scheduler, variant(Scheduler, sampler=sampled_by(Remembering)), "determinism law: two samplers"),
    (checks.check_scheduler, variant(Scheduler, sampler=sampled_by(Mixing)), "batch law: a sample's walk"),
    (checks.check_scheduler, variant(Scheduler, sampler=sampled_by(Lost)), "walk law"),
    # modality
    (modality, variant(Modality, extent=lambda s, raw: raw.shape), "extent law"),
    (modality, Wandering, "determinism law: the view for evaluation"),
    (modality, Global, "determinism law: equal generators"),
    (modality, View2, "view law: the size of the view"),
    (modality, Outside, "view law: .* does not lie inside"),
    (modality, Drawing, "view law: start and stop have 3 and 3 entries for 2 axes"),
    (modality, tensor_of(lambda x: x[:1]), "shape law"),
    (modality, tensor_of(lambda x: x.double()), "type law: the tensor is torch.float64"),
    (modality, tensor_of(lambda x: x / 0), "finite law: the tensor"),
    (modality, tensor_of(lambda x: 3 * x), "range law: values"),
    (modality, Flickering, "determinism law: two tensors"),
    (modality, FixedSize, "size law"),
    (modality, lambda: Labels(torch.tensor(4)), "range law: class ids"),
    (modality, lambda: Labels(torch.tensor(1.0)), "type law: class ids"),
    (modality, lambda: variant(Modality, mask=lambda s, raw, view: torch.ones(3))(mask=True), "mask law: the mask is"),
    (modality, lambda: variant(Modality, mask=lambda s, raw, view: torch.zeros(view.size).bool())(mask=True),
     "mask law: no position is valid"),
    (modality, variant(Modality, values=lambda s, x: x[0]), "values law"),
    (modality, variant(Modality, values=lambda s, x: x / 0), "finite law: values"),
    (modality, variant(Modality, picture=lambda s, x: x), "show law: picture"),
    (modality, variant(Modality, shown_channels=(0, 2)), "show law: shown_channels has 2, but the tensor has 2 chan"),
    (modality, lambda: Modality(names=("a", "b", "c")), "names law: the spec names 3 channels, and values have 2"),
    (modality, variant(Modality, show=lambda s, x: None), "show law: show returns nothing"),
    (modality, variant(Modality, show=lambda s, x: x.numpy() * 0.5), "round-trip law: read"),
    (modality, variant(Modality, show=lambda s, x: "text"), "round-trip law: read does not take"),
    (modality, Sloping, "flip law"),
    (modality, variant(Writing, written=".wav"), "write law: written is .wav, the suffixes are .npy"),
    (modality, variant(Writing, write=lambda s, shown, path: None), "write law: write made no file a.npy"),
    (modality, variant(Writing, write=lambda s, shown, path: path.write_text("no")), "write law: read does not take"),
    (modality, variant(Modality, read=in_less_detail(lambda raw: raw[:, ::2])), "detail law: the extent is"),
    (modality, variant(Modality, read=in_less_detail(lambda raw: -raw)), "detail law: the mean difference"),
    (modality, variant(Halving, tensor=one_channel_less), "detail law: tensors are"),
    (modality, variant(Halving, read=trusting_less), "damage law: read with at_least takes a damaged file"),
    (modality, tensor_of(lambda x: x, hole_value=0.0), "hole law: the last channel"),
    (modality, tensor_of(lambda x: torch.stack([x[0], x[1].sign()]), hole_value=0.0), "hole law: .* values than 0.0"),
    (modality, variant(Modality, suffixes=(".NPY",)), "suffix law"),
    (modality, variant(Modality, read=trusting), "damage law: read takes a damaged file"),
    (modality, variant(Modality, read=crashing), "damage law: a damaged file .* raises ValueError"),
    (modality, variant(Modality, read=nan_reader), "damage law|finite law"),
    (modality, variant(Modality, metrics=("psrn",)), "metrics law: .*Did you mean 'psnr'"),
    (modality, Clipping, "purity law: a method changes what read returned"),
    (modality, variant(Modality, streams=(".png",)), r"streams law: '\.png' is not one of the suffixes"),
    (filed, variant(Modality, streams=(".npy",)), "streams law: a stream cannot be read a second time"),
    (filed, variant(Streaming, read=negated), "streams law: a stream read differs from its file"),
    (modality, variant(Streaming, read=trusting_streams), "damage law: read takes a damaged stream"),
    (modality, Undecided, "reading law: reading is different"),
    (modality, variant(Modality, reading=[1]), "reading law: reading cannot be compared"),
    (modality, variant(Riding, weight=lambda s, raw, view: torch.ones(3)), "weight law: the weight is torch.float32"),
    (modality, variant(Riding, weight=lambda s, raw, view: -torch.ones(view.size)), "weight law: a position counts -1"),
    (modality, variant(Riding, weight=lambda s, raw, view: torch.ones(view.size) / 0), "finite law: the weight"),
    (modality, variant(Riding, ride=lambda s, view, main: dataclasses.replace(view, size=(4,))), "ride law: the size"),
    (modality, variant(Riding, ride=lambda s, view, main: dataclasses.replace(view, start=(0.5, 2.0))), "view law"),
    (modality, variant(FixedSize, ride=Riding.ride), "shape law: .* not \\(2, 4, 4\\)"),
    (modality, variant(Finishing, finish=Modality.values), "shape law: \\(2, 16, 16\\), not \\(2, 8, 8\\)"),
    (modality, finished(lambda y, x: y * 3), "range law"),
    (modality, finished(lambda y, x: y / 0), "finite law: the tensor"),
    (modality, finished(lambda y, x: y - y.mean(0) * (len(y) > 1)), "batch law: a finished sample"),
    (modality, finished(lambda y, x: y + 0 * x.clamp_(-0.5, 0.5).sum()), "purity law: finish changes its input"),
    (modality, finished(lambda y, x: y[:1]), "finish law: 1 samples come out, 5 went in"),
    (modality, variant(Riding, sizing=("crop",)), "sizing law: 1 words for 2 axes"),
    (modality, variant(Cutting, view=Modality.view, tensor=Modality.tensor),
     "sizing law: axis 0 is 'window', but 16 of 16 positions become 4"),
    (modality, variant(Cutting, extent_of=lambda s, source: source.shape),
     "extent law: extent_of says \\(2, 16, 16\\)"),
    (modality, variant(Cutting, fill=7.0), "fill law: 7.0"),
    # data
    (data, variant(Windows, get=lambda s, i, label="": Window(s.samples[i // 2], (0, 4), (8, 12))),
     "reading law: .* the window \\[0, 4\\] to \\[8, 12\\] does not lie inside the file, whose extent is \\[8, 8\\]"),
    (data, variant(Windows, key=lambda s, i: str(i // 2)), "key law: 6 of 12 keys are not unique"),
    (data, variant(Data, __len__=lambda s: 0), "length law: there are no samples"),
    (data, variant(Data, left_out={".txt": 0}), "left-out law: 0 x '.txt'"),
    (data, variant(Data, left_out={"": 2}), "left-out law: 2 x ''"),
    (data, variant(Data, get=lambda s, i, label="": __file__, bytes_of=lambda s, i, label="": 7),
     r"bytes law: sample 0 has \d+ bytes, bytes_of says 7"),
    (data, variant(Data, shards=[("a", 2), ("b", 3)]), "shards law: the shards have 5 samples, the source has 6"),
    (data, variant(Data, shards=[("a", 2), ("a", 4)]), "shards law: two shards are called 'a'"),
    (data, variant(Data, shards=[("a/b", 6)]), "shards law: 'a/b' does not fit in a file name"),
    (data, variant(Data, blocks=Blocks([2, 3], 4)), "blocks law: blocks of .2, 3. samples, 4 together, for 6"),
    (data, variant(Data, blocks=Blocks([6, 0], 4)), "blocks law"),
    (data, variant(Data, blocks=Blocks([6], 0)), "blocks law"),
    (data, keyed(lambda i: "same"), "key law: 5 of 6 keys are not unique"),
    (data, keyed(lambda i: f"/data/{i}"), "key law: '/data/0' is not a relative path"),
    (data, keyed(lambda i: f"../{i}"), "key law"),
    (data, keyed(lambda i: f"a\\{i}"), "key law"),
    (data, Renaming, "key law: the keys are different in a worker"),
    (data, Restless, "determinism law: sample"),
    (data, Forgetful, "determinism law: .* in a worker"),
    (data, Shrinking, "length law: 5 samples in a worker"),
    (data, variant(Data, get=lambda s, i, label="": np.full((2, 8, 8), np.nan)), "reading law: sample 0"),
    (data, variant(Tokenized, coded=lambda s, i: None), "codes law: .* there are no codes of 'part/000'"),
    (data, variant(Tokenized, coded=lambda s, i: Tokenized.coded(s, 0)), "codes law: .* '.*3' are those of '.*0'"),
    (data, coded(np.zeros((2, 2, 1), np.uint8)), "codes law: the codes of 'part/000' are uint8"),
    (data, coded(np.zeros((2, 1), int)), r"codes law: .* shape \(2, 1\), not \(2, 2, 1\)"),
    (data, coded(np.full((2, 2, 1), 9)), r"codes law: 9 to 9 of 'part/000' do not lie in \[0, 9\)"),
    # reader
    (reader, variant(Reader, suffixes=(".NPY",)), "suffix law: '.NPY' is not"),
    (reader, variant(Reader, suffixes=(".npz",)), "suffix law: a.npy ends in none"),
    (reader, variant(Reader, read=lambda s, path: Reader.read(s, path).astype(object)), "array law: read returns obj"),
    (reader, variant(Reader, read=lambda s, path: Reader.read(s, path)[:0]), "array law: read returns an empty array"),
    (reader, variant(Reader, read=numbered), "determinism law: two readings"),
    (reader, variant(Reader, read=shyly), "determinism law: two readings"),
    (reader, variant(Reader, part="column", **PARTS), "parts law: 'column' is no setting"),
    (reader, variant(Reader, part="name", **PARTS), "parts law: parts gives"),
    (reader, variant(Reader, read=crashing_reader), "damage law: a damaged file .* raises ValueError"),
    (reader, variant(Reader, read=lambda s, path: SAMPLE), "damage law: read takes a damaged file"),
    # store
    (checks.check_store, variant(Store, write=lambda s, f, n, rows, m: [*Store.write(s, f, n, rows, m), "more"]),
     "files law: write names .'more'"),
    (checks.check_store, variant(Store, open=lambda s, folder, manifest: object()),
     "members law: what open returns has no"),
    (checks.check_store, stored(__len__=lambda s: 2), "length law: 6 rows were written, 2 come back"),
    (checks.check_store, stored(key=lambda s, i: s.line(i) and "a/1"), "key law: row 2 has the key 'a/1'"),
    (checks.check_store, stored(find=lambda s, key: Stored.find(s, key) and 1),
     "key law: 'a/2#1' is found at 1, not 2"),
    (checks.check_store, stored(codes=lambda s, i: Stored.codes(s, i).astype(np.uint16)),
     "codes law: the codes of row 2 changed, uint16"),
    (checks.check_store, stored(keys=lambda s: Stored.keys(s)[1:]), "keys law: keys gives"),
    (checks.check_store, stored(many=lambda s, places: Stored.many(s, sorted(places))), "many law"),
    (checks.check_store, stored(extras=lambda s, i: {}), "extras law: the extras of row 2 are {}"),
    (checks.check_store, stored(find=lambda s, key: [line[0] for line in s.lines].index(key)),
     "bounds law: 'nothing' raises ValueError, not KeyError"),
    (checks.check_store, stored(line=lambda s, i: s.lines[i % 6]), "bounds law: there is a row 6"),
    (checks.check_store, variant(Store, write=numbered_write), "bytes law: equal rows"),
    (checks.check_store, variant(Store, write=lambda s, f, n, rows, m: rows[0] and Store.write(s, f, n, rows, m)),
     "empty law: a shard without rows raises IndexError"),
    (checks.check_store, variant(Store, open=careless_open),
     "damage law: a file that is cut off raises JSONDecodeError"),
    (lambda made: checks.check_store(made, given=[({}, [])]), Store, "rows law: a store of ours holds all rows"),
    (adopting, variant(Adopting, open=lambda s, folder, manifest: Store.open(s, folder, manifest)),
     r"alone law: without a list of shards, open gives \[\]"),
    (adopting, variant(Adopting, held=lambda s, folder, key, manifest: Adopting.held(s, folder, key, manifest) or []),
     "held law: a file that is not there has rows"),
    (adopting, variant(Adopting, held=lambda s, folder, key, manifest: None), "held law: the rows that held gives"),
    (adopting, variant(Adopting, held=from_memory), "held law: held gives rows of a file that is cut off"),
    (adopting, variant(Adopting, views=lambda s, folder, key, extent: []), "views law"),
    # text
    (text, spelt(lambda ids: ids[:1]), "length law: 3 texts have 1 lists"),
    (text, spelt(lambda ids: [[300] * len(one) for one in ids]), "range law: \\[300\\] is no id below vocab_size=256"),
    (text, spelt(lambda ids: [one + [0] * (len(ids) > 1) for one in ids]), "batch law: the ids of 'a cat' depend"),
    (text, spelt(decode=lambda found: found[:1]), "length law: decode gives 1 values"),
    (text, spelt(decode=lambda found: [one.upper() for one in found]), "round-trip law: the ids of"),
    (text, looked_into(pieces=lambda self, ids: ["x"]), "pieces law: 5 ids have the pieces \\['x'\\]"),
    (text, looked_into(facts=lambda self: {"letters": 5}), "pieces law: the fact 'letters' is no text"),
    (learning, lambda: lambda file: Letters(), "learning law: the text tokenizer has no train and save"),
    (learning, speller(save=lambda self, path: path.write_text(path.name)), "determinism law: two trainings"),
    (learning, speller(save=lambda self, path: path.write_text(self.letters[::-1])), "save law: a tokenizer with"),
    (learning, speller(read=lambda self, file: Path(file).read_text()), "damage law: file takes a damaged vocabulary"),
    # metric
    (metric, measured(lambda s, a, b: {k: v.float() for k, v in s.items()}), "is torch.float32, not float64"),
    (metric, measured(lambda s, a, b: {**s, "sum": s["sum"] / 0}), "finite law: the sum"),
    (metric, measured(lambda s, a, b: {**s, "sum": s["sum"] / len(a)}), "sums law: 'sum' over batches"),
    (metric, measured(lambda s, a, b: {**s, f"of{len(a)}": s["sum"]}), "sums law: names are"),
    (metric, measured(lambda s, a, b: {**s, "sum": (a - b)[-1].double().square().sum()}),
     "sums law"),
    (metric, variant(Metric, measure=keyless), "call law: measure.* unexpected keyword argument 'keys'"),
    (metric, Spoiling, "purity law"),
    (metric, variant(RowMetric, facts=lambda s: {"net": 1}), "facts law: facts returns {'net': 1}, not texts"),
    (metric, variant(RowMetric, facts=lambda s: {"now": str(torch.rand(()))}), "facts law: .* something else"),
    (metric, per_row(lambda rows: {"off": rows["off"].sum()}), "rows law: 'off' has the shape \\(\\) for 5 samples"),
    (metric, per_row(lambda rows: {"off": rows["off"].half()}), "rows law: 'off' is torch.float16"),
    (metric, per_row(lambda rows: {**rows, "count": rows["off"]}), "rows law: 'count' is the number of rows"),
    (metric, per_row(lambda rows: {"off": rows["off"] - rows["off"].mean()}), "sums law: .* must not depend on the"),
    (metric, variant(Metric, measure=doubled), "weight law: a weight of 1 changes 'sum'"),
    (metric, weighing(lambda weight: 1 - (1 - weight) / 2), "weight law: 'sum' with a weight of 0 differs"),
    (metric, weighing(lambda weight: (weight > 0).double()), "weight law: weights change nothing"),
    (metric, MaskBlind, "mask law: invalid positions"),
    (metric, MaskTouchy, "sums law: .* a mask of all True"),
    (metric, summed(lambda f: {"": float("nan")}), "summary law: '' is nan"),
    (metric, summed(lambda f: {"": torch.tensor(1.0)}), "summary law"),
    (metric, summed(lambda f: {"zero" if f[""] == 0 else "": f[""]}), "summary law: the names are"),
    (metric, variant(Metric, better=None), "direction law: better is None"),
    (metric, variant(Metric, better="higher"), "direction law: higher is better"),
    # hook
    (checks.check_hook, Misspelt, "hook law: .*vqcore_step_endet"),
    (checks.check_hook, WrongArgument, "hook law: .*loss"),
    (checks.check_hook, Unmarked, "hook law: vqcore_saved is never called"),
    (checks.check_hook, Deaf, "hook law: Deaf has no method that a run calls"),
]  # fmt: skip


def names(table):
    """A name for each row: how it is checked, and what it breaks."""
    return [f"{getattr(row[0], '__name__', 'check')}: {row[-1]}" for row in table]


def broken(check, made, text):
    """The places in the kit that lead to its verdict, which is `text`."""
    with warnings.catch_warnings(), pytest.raises(AssertionError, match=f"(?s){text}") as raised:
        warnings.simplefilter("ignore")
        check(made)
    places = {(Path(entry.path).name, entry.lineno + 1) for entry in raised.traceback}
    return places


@pytest.mark.parametrize(("check", "make", "text"), BAD, ids=names(BAD))
def test_each_law_catches_who_breaks_it(check, make, text):
    broken(check, make(), text)


def test_a_quantizer_that_is_fitted_passes():
    checks.check_quantizer(Fitted())


def test_a_text_tokenizer_that_learns_passes():
    checks.check_learning(Spelling, ("a cat", "", "two cats"))
    made = Spelling()
    made.train(("a cat", "", "two cats"))
    text(made)


# Waivers


def test_a_modality_that_writes_passes():
    checks.check_modality(Writing(), SAMPLE)


def test_a_modality_that_reads_less_for_training_passes():
    checks.check_modality(Halving(), SAMPLE)


def test_a_modality_that_finishes_or_rides_in_its_own_way_passes():
    checks.check_modality(Finishing(), SAMPLE, waived={"round-trip": "shows features, reads pictures"})
    checks.check_modality(Riding(), SAMPLE)
    checks.check_modality(Cutting(), SAMPLE, waived={"round-trip": "shows a window"})


def test_a_data_source_of_windows_passes():
    checks.check_data(Windows(), Modality())
    checks.check_data(Tokenized(), Modality())


def test_a_waiver_lets_one_law_go_and_no_other():
    position = variant(Quantizer, forward=shifted_codes)()
    checks.check_quantizer(
        position, waived={"position-wise": "adds a position", "idempotent": "adds a position"}
    )
    checks.check_metric(MaskBlind(), SPEC, waived={"mask": "needs whole samples"})
    checks.check_modality(Sloping(), SAMPLE, waived={"flip": "has no left and right"})
    shouting = spelt(decode=lambda found: [one.upper() for one in found])()
    checks.check_text(shouting, ("a cat",), waived={"round-trip": "knows capitals only"})
    with pytest.raises(AssertionError, match="waived: \\['rage'\\] cannot be waived; these can: mask"):
        checks.check_metric(Metric(), SPEC, waived={"rage": "typo"})


# Objectives: with a tokenizer of toys


TOKENIZER = {
    "modality": {"name": "array", "channels": 2, "size": [8, 8], "range": [-1, 1]},
    "size": [8, 8],
    "model": {
        "encoder": {"name": "toy/encoder"},
        "quantizer": {"name": "toy/quantizer"},
        "decoder": {"name": "toy/decoder"},
    },
}
BATCH = Batch(X.tanh(), ("a", "b", "c"))


def tokenizer(decoder="toy/decoder", **objective):
    tree = {**copy.deepcopy(TOKENIZER), "objective": objective or {"name": "reconstruction"}}
    tree["model"]["decoder"]["name"] = decoder
    return Tokenizer(from_tree(tree, schema=TokenizerConfig))


class Counting(Objective):
    """Counts evaluations."""

    def __init__(self):
        super().__init__()
        self.seen = nn.BatchNorm1d(1, affine=False)

    def losses(self, tokenizer, batch, *, player, step, rng, shared):
        self.seen.num_batches_tracked += 1
        return super().losses(tokenizer, batch, player=player, step=step, rng=rng, shared=shared)


class Vectors(Objective):
    def losses(self, tokenizer, batch, *, player, step, rng, shared):
        out = super().losses(tokenizer, batch, player=player, step=step, rng=rng, shared=shared)
        return replaced(out, metrics={"toy/many": torch.ones(2)})


class Playing(Objective):
    """Names a second player at some steps."""

    def __init__(self, module=None):
        super().__init__()
        if module is not None:
            self.judge = module

    def players(self, step):
        return ("model", "judge")

    def losses(self, tokenizer, batch, *, player, step, rng, shared):
        if player == "model":
            return super().losses(tokenizer, batch, player=player, step=step, rng=rng, shared=shared)
        return Losses({"gan/hinge": self.judge(batch.x.flatten(1)).mean()})


class IdleObjective(Objective):
    """Holds a parameter that no loss uses."""

    def __init__(self):
        super().__init__()
        self.head = nn.Parameter(torch.ones(3))


class Keeping(Objective):
    """Keeps the tokenizer as a submodule."""

    def setup(self, tokenizer):
        super().setup(tokenizer)
        self.kept = tokenizer


class Careless(Playing):
    """Believes whatever it finds in `shared`."""

    def losses(self, tokenizer, batch, *, player, step, rng, shared):
        out = super().losses(tokenizer, batch, player=player, step=step, rng=rng, shared=shared)
        if player == "model":
            return out
        shown = shared.get("x_hat", batch.x)
        return Losses({"gan/hinge": self.judge(shown.flatten(1)).mean()})


class Alike(Playing):
    """The second player has a loss of the first one's name."""

    def losses(self, tokenizer, batch, *, player, step, rng, shared):
        out = super().losses(tokenizer, batch, player=player, step=step, rng=rng, shared=shared)
        return out if player == "model" else Losses({"pixel/mse": out.terms["gan/hinge"]})


class Late(Objective):
    """Makes a buffer when it sees the first batch."""

    def losses(self, tokenizer, batch, *, player, step, rng, shared):
        if tokenizer.training:
            self.register_buffer("mean", batch.x.mean())
        return super().losses(tokenizer, batch, player=player, step=step, rng=rng, shared=shared)


def judging(cls):
    return lambda: cls(nn.Linear(2 * 64, 1))


def with_factors(factors):
    def losses(self, tokenizer, batch, *, player, step, rng, shared):
        out = Objective.losses(self, tokenizer, batch, player=player, step=step, rng=rng, shared=shared)
        return replaced(out, factors=factors)

    return variant(Objective, losses=losses)


def changed_losses(change):
    def losses(self, tokenizer, batch, *, player, step, rng, shared):
        out = Objective.losses(self, tokenizer, batch, player=player, step=step, rng=rng, shared=shared)
        return replaced(out, terms=change(dict(out.terms), step, tokenizer))

    return variant(Objective, losses=losses)


def changed_decode(change):
    def decode(self, tokenizer, codes, *, size, rng, extras=None):
        x_hat = Objective.decode(self, tokenizer, codes, size=size, rng=rng)
        return change(x_hat, tokenizer)

    return variant(Objective, decode=decode)


def optional(annotation, default=2):
    """An objective whose decode has one option, `steps`, of this annotation."""

    def decode(self, tokenizer, codes, *, size, rng, extras=None, steps=default):
        return Objective.decode(self, tokenizer, codes, size=size, rng=rng)

    decode.__annotations__ = {} if annotation is None else {"steps": annotation}
    return variant(Objective, decode=decode)


class Changed:
    """A denoiser that is called with other noise levels."""

    def __init__(self, denoiser, change):
        self.denoiser, self.change = denoiser, change

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def __call__(self, x_t, t, cond):
        return self.denoiser(x_t, cond=cond, t=self.change(t))


def levelled(change):
    """Makes an objective that gives its denoiser changed noise levels."""

    def make():
        base = parts_of_toys().Denoising

        def losses(self, tokenizer, batch, **more):
            odd = SimpleNamespace(
                latents=tokenizer.latents,
                quantize=tokenizer.quantize,
                decoder=Changed(tokenizer.decoder, change),
            )
            return base.losses(self, odd, batch, **more)

        return variant(base, losses=losses)(None, spec=SPEC)

    return make


def taking_seed(self, tokenizer, codes, *, size, rng, extras=None, seed: Annotated[int, "Seed."] = 0):
    return Objective.decode(self, tokenizer, codes, size=size, rng=rng)


def without_default(self, tokenizer, codes, *, size, rng, extras=None, steps: Annotated[int, "Steps."]):
    return Objective.decode(self, tokenizer, codes, size=size, rng=rng)


def marking(value, tokenizer):
    with torch.no_grad():
        tokenizer.proj.weight += 1e-3  # decoding does not need it
    return value


OBJECTIVES = [
    (nothing, "protocol law: object lacks setup"),
    (variant(Objective, players=lambda s, step: ("decoder",)), "players law: .* never train the tokenizer"),
    (Playing, "players law: the objective has no module with the player's name 'judge'"),
    (changed_losses(lambda t, step, k: {}), "names law: model has no losses"),
    (changed_losses(lambda t, step, k: {**t, "pixel/mse": torch.ones(2) * t["pixel/mse"]}), "is not a scalar"),
    (changed_losses(lambda t, step, k: {**t, "pixel/mse": t["pixel/mse"] / 0}), "finite law: pixel/mse"),
    (changed_losses(lambda t, step, k: t if step == 0 else {**t, "late": t["pixel/mse"]}), "at another step"),
    (changed_losses(lambda t, step, k: t if k.training else {"pixel/mse": t["pixel/mse"]}), "in eval mode"),
    (changed_losses(lambda t, step, k: {"pixel/mse": t["pixel/mse"]} if k.training else t),
     "names law: model never has the loss vq/commit in training"),
    (changed_losses(lambda t, step, k: {"vq/commit": t["vq/commit"]}), "gradient law: no gradient reaches decoder"),
    (changed_losses(lambda t, step, k: {**t, "pixel/mse": t["pixel/mse"] + torch.rand(())}), "source of randomness"),
    (Counting, "eval changes no state"),
    (Vectors, "names law: the metric toy/many is not a scalar"),
    (changed_decode(lambda x, k: x[:, :1]), "shape law: decode"),
    (changed_decode(lambda x, k: x / 0), "finite law: decode"),
    (changed_decode(lambda x, k: x + torch.rand(())), "determinism law: decode"),
    (changed_decode(lambda x, k: x * len(x)), "batch law: decoding"),
    (changed_decode(marking), "decode changes no state"),
    (Keeping, "state law: the objective keeps the tokenizer as a submodule"),
    (IdleObjective, "gradient law: no gradient of the losses of model reaches 'head' of the objective"),
    (judging(Careless), "shared law: gan/hinge of judge differs"),
    (judging(Alike), "names law: the players model and judge both return pixel/mse"),
    (Late, "state law: objective/mean came or went after setup"),
    (with_factors({"pixel/mes": 2.0}), "names law: the factor .'pixel/mes'. belongs to no loss of model"),
    (with_factors({"pixel/mse": torch.ones(2)}), "names law: the factor pixel/mse is no plain scalar"),
    (levelled(lambda t: (1000 * t).long()), "time law: a denoiser gets t as torch.int64; cast it to float"),
    (levelled(lambda t: t[0]), r"time law: a denoiser gets t of shape \(\) for 3 samples"),
    (optional(None), "options law: decode's option steps has no type; write steps: Annotated"),
    (optional(int), "options law: decode's option steps has no text"),
    (optional(Annotated[list, "Steps."]), "options law: .* steps is list; an option is"),
    (optional(Annotated[dict[str, int], "Steps."]), "options law: .* an option is"),
    (optional(Annotated[int, "Steps."], default=2.5), "options law: steps=2.5 is not an integer"),
    (variant(Objective, decode=taking_seed), "options law: .* seed has the name of a parameter of Tokenizer.decode"),
    (variant(Objective, decode=without_default), "options law: decode's option steps has no default"),
]  # fmt: skip


def test_an_adversary_may_hold_what_is_not_known_yet():
    class Adaptive(Rival):
        def __init__(self, seed=0):
            super().__init__(seed)
            self.register_buffer("known", torch.tensor([1.0, torch.nan]))

    checks.check_adversary(Adaptive(), X + 0.3, X.clone(), fresh=Adaptive(1))
    law = variant(Adaptive, logits=lambda s, x: s.known[1:].fill_(0) + Rival.logits(s, x))
    with pytest.raises(AssertionError, match="eval changes no state"):
        checks.check_adversary(law(), X + 0.3, X.clone())


def test_good_objectives_pass(toy):
    checks.check_objective(Objective(), tokenizer(), BATCH)
    rival = {"adversary": {"name": "toy/gan", "start": 2}, "weights": {"vq/commit": {1: 0, 9: 1}}}
    for settings in ({"name": "toy/adversary"}, {"name": "reconstruction", **rival}):
        made = tokenizer(**settings)  # losses that wait for their start
        checks.check_objective(made.objective, made, BATCH)
    for settings in (
        {"name": "toy/denoising"},
        {"name": "diffusion", "scheduler": {"name": "toy/ddpm"}, "cls_free_guidance_dropout": 0.5},
    ):
        made = tokenizer("toy/denoiser", **settings)
        checks.check_objective(made.objective, made, BATCH)
    checks.check_objective(optional(Annotated[float | None, "Any."], default=None)(), tokenizer(), BATCH)
    torch.manual_seed(0)
    checks.check_objective(Playing(nn.Linear(2 * 64, 1)), tokenizer(), BATCH)


def objective(made):
    decoder = "toy/denoiser" if protocols.needs_denoiser(made) else "toy/decoder"
    kind = "toy/denoising" if protocols.needs_denoiser(made) else "reconstruction"
    checks.check_objective(made, tokenizer(decoder, name=kind), BATCH)


@pytest.mark.parametrize(("make", "text"), OBJECTIVES, ids=[text for _, text in OBJECTIVES])
def test_each_law_of_objectives_catches_who_breaks_it(toy, make, text):
    broken(objective, make(), text)


def test_an_unused_part_of_a_second_player_is_found(toy):
    idle = nn.Linear(2 * 64, 1)
    idle.register_parameter("idle", nn.Parameter(torch.ones(2)))
    with pytest.raises(AssertionError, match="no gradient reaches idle"):
        checks.check_objective(Playing(idle), tokenizer(), BATCH)


# Hooks: a run with and without


class Meddling:
    """Changes weights."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Base):
        """Settings."""

    def __init__(self, cfg):
        pass

    @hookimpl
    def vqcore_step_ended(self, run):
        with torch.no_grad():
            run.tokenizer.proj.weight += 1e-3


class Raising(Meddling):
    @hookimpl
    def vqcore_step_ended(self, run):
        raise KeyError("loss")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "text"), [(Meddling, "state law: a run ends with other"), (Raising, "KeyError")]
)
def test_a_hook_that_meddles_or_raises_is_found(toy, tmp_path, monkeypatch, cls, text):
    parts = parts_of_toys()
    run = as_run(run_tree(tmp_path, run__steps=2))
    checks.check_observer(run, {"diary": parts.Diary.Config(name="toy/diary")})
    monkeypatch.setattr(parts, "Diary", cls)
    with pytest.raises(AssertionError, match=text):
        checks.check_observer(run, {"odd": cls.Config(name="toy/diary")})


def parts_of_toys():
    import vqcore_toy.parts

    return vqcore_toy.parts


# Formats


def written(folder, name="small.toy.pth", drop=()):
    made = tokenizer()
    tensors = {k: v for k, v in made.state_dict().items() if k not in drop}
    path = Path(folder) / name
    torch.save({"config": to_tree(made.cfg), "tensors": tensors}, path)
    return path


def test_formats(toy, tmp_path):
    plain = parts_of_toys().Plain
    checks.check_format(plain(None), written(tmp_path))
    read = plain.read

    def unasked(self, path, *, allow_pickle):
        return read(self, path, allow_pickle=True)

    def raising(self, path, *, allow_pickle):
        try:
            return read(self, path, allow_pickle=allow_pickle)
        except Exception as error:
            raise KeyError(str(error)) from error

    def lenient(self, path, *, allow_pickle):
        return read(self, written(tmp_path, "other.toy.pth"), allow_pickle=True)

    def careless(self, path, *, allow_pickle):
        return dataclasses.replace(read(self, path, allow_pickle=allow_pickle), origin={"source": path})

    def drawing_weights(self, path, *, allow_pickle):
        found = read(self, path, allow_pickle=allow_pickle)
        return dataclasses.replace(found, tensors={k: v + torch.rand(()) for k, v in found.tensors.items()})

    bad = [
        (
            variant(plain, recognises=lambda s, path: False),
            "recognition law: the format does not recognise small.toy.pth",
        ),
        (
            variant(plain, recognises=lambda s, path: True),
            "recognition law: the format recognises nothing-there.unknown",
        ),
        (
            variant(plain, recognises=lambda s, path: path.stat().st_size > 0),
            "recognition law: .* for a path",
        ),
        (variant(plain, recognises=None), "protocol law: recognises of .* is not a method"),
        (variant(plain, read=unasked), "damage law: the format takes a pickle without"),
        (variant(plain, read=raising), "damage law: .* raises KeyError"),
        (variant(plain, read=lenient), "damage law: the format takes a damaged file"),
        (variant(plain, read=careless), "origin law: origin is not plain JSON data"),
        (variant(plain, read=drawing_weights), "determinism law: two readings"),
    ]
    for cls, text in bad:
        with pytest.raises(AssertionError, match=text):
            checks.check_format(cls(None), written(tmp_path))
    short = written(tmp_path, "short.toy.pth", drop=("proj.weight",))
    with pytest.raises(AssertionError, match=r"filling law: .*proj\.weight"):
        checks.check_format(plain(None), short)


def neither(cls):
    """The class without its way to read."""
    return type(
        cls.__name__, (), {"Config": cls.Config, "recognises": cls.recognises, "__init__": cls.__init__}
    )


def test_formats_that_write(toy, tmp_path):
    boxes = parts_of_toys().Boxes
    cfg = boxes.Config(name="toy/boxes")
    box = tmp_path / "box"
    box.mkdir()
    boxes(cfg).write(tokenizer(), box)
    checks.check_format(boxes(cfg), box)
    write = boxes.write

    def nothing(self, tokenizer, folder):
        (folder / "notes.txt").touch()

    def short(self, tokenizer, folder):
        write(boxes(dataclasses.replace(cfg, drop=1)), tokenizer, folder)

    def with_another_codebook(self, tokenizer, folder):
        tokenizer.quantizer.embed += 1.0
        write(self, tokenizer, folder)

    def with_another_decoder(self, tokenizer, folder):
        tokenizer.decoder.linear.bias.data += 1.0
        write(self, tokenizer, folder)

    one = protocols.Published("a", "me/a")
    bad = [
        (variant(boxes, write=nothing), "round trip law: the format does not recognise what it wrote"),
        (variant(boxes, write=short), "filling law: .*encoder.linear.weight and 0 more"),
        (
            variant(boxes, write=with_another_decoder),
            "state law: a tensor changes when the format writes and",
        ),
        (variant(boxes, published=("me/a",)), "published law: 'me/a' is not a Published"),
        (
            variant(boxes, published=(protocols.Published("a", "hf://me/a"),)),
            "id is not of the form user/name",
        ),
        (variant(boxes, published=(one, one)), "published law: a name occurs twice: a, a"),
        (
            variant(boxes, published=property(lambda self: (one,))),
            "published law: published is not a tuple of",
        ),
        (neither(boxes), "protocol law: Boxes lacks read or config, which every format has"),
    ]
    for cls, text in bad:
        with pytest.raises(AssertionError, match=text):
            checks.check_format(cls(cfg), box)


def test_formats_of_training_configs(toy, tmp_path):
    notes = parts_of_toys().Notes
    cfg = notes.Config(name="toy/notes")
    path = tmp_path / "old.toyrc"
    path.write_text("steps 3\n")
    checks.check_format(notes(cfg), path)
    config, drawn = notes.config, iter(range(100))

    def changed(**changes):
        return variant(notes, config=lambda self, path: {**config(self, path), **changes})

    def noted(comments, **run):
        def explained(self, path, flags):
            tree = dict(config(self, path))
            return protocols.ForeignConfig({**tree, "run": {**tree["run"], **run}}, comments)

        return variant(notes, explained=explained)

    checks.check_format(noted({"optim.lr": "as said"})(cfg), path)

    def any_file(self, path):
        return config(self, tmp_path / "old.toyrc")

    bad = [
        (
            variant(notes, recognises=lambda s, path: False),
            "recognition law: the format does not recognise old",
        ),
        (changed(optim={"lr": 0}), "training config law: vqcore refuses the config: .*optim.lr=0"),
        (changed(extra=1), "training config law: vqcore refuses the config: .*extra"),
        (changed(run={"steps": (3,)}), "training config law: config gives more than nested"),
        (
            variant(notes, config=lambda s, path: {"n": next(drawn)}),
            "determinism law: two readings give different",
        ),
        (variant(notes, config=any_file), "damage law: the format takes a damaged file"),
        (noted({"optim.lr": "as said"}, steps=4), "explained and config read different configs"),
        (noted({"optim.rate": "as said"}), "a note for optim.rate, which the config does not have"),
        (noted({"optim.lr.x": "as said"}), "a note for optim.lr.x, which the config does not have"),
    ]
    for cls, text in bad:
        with pytest.raises(AssertionError, match=text):
            checks.check_format(cls(cfg), path)
    like = notes.like

    def family(change):
        def changed(self, name):
            found = like(self, name)
            tree = {key: dict(node) for key, node in found.tree.items()}
            return change(found, tree) or dataclasses.replace(found, tree=tree)

        return variant(notes, like=changed)

    bad = [
        (variant(notes, families=["small"]), "family law: families is not a tuple of the class"),
        (variant(notes, families=()), "family law: families is not a tuple of the class with a name in it"),
        (variant(notes, families=("small", "Small")), "family law: a name occurs twice"),
        (variant(notes, families=("a/small",)), "family law: 'a/small' is no name"),
        (
            variant(notes, like=lambda s, name: like(s, "small")),
            "family law: the format has a family for every",
        ),
        (
            variant(notes, like=lambda s, name: like(s, {"small": "small", "classes": "small"}[name])),
            "family law: KeyError for an unknown family",
        ),
        (
            family(lambda found, tree: tree.pop("model") and None),
            "family law: small says nothing about model",
        ),
        (
            family(lambda found, tree: tree["data"].update(path="x")),
            "family law: small says data.path, which",
        ),
        (
            family(lambda found, tree: tree["data"].update(input_size_max=[16, 16])),
            "family law: data.input_size_max of small is no whole number",
        ),
        (
            family(lambda found, tree: tree["run"].update(epochs=(3,))),
            "family law: small gives more than nested",
        ),
        (
            family(lambda found, tree: tree["optim"].update(lr=0)),
            "vqcore refuses the config of small: .*lr=0",
        ),
        (
            family(lambda found, tree: dataclasses.replace(found, notes={"optim.rate": "x"})),
            "family law: small has a note for optim.rate",
        ),
    ]
    for cls, text in bad:
        with pytest.raises(AssertionError, match=text):
            checks.check_format(cls(cfg), path)
    # A format that reads both kinds of files is given one of each.
    both = variant(parts_of_toys().Plain, config=any_file, lr=0.1)
    both.recognises = lambda self, path: path.suffix in (".pth", ".toyrc")
    with pytest.raises(AssertionError, match="damage law: the format takes a damaged file"):
        checks.check_format(both(None), written(tmp_path), config=path)


# vqcore plugins --check

PLUGIN = """
from dataclasses import dataclass
from vqcore import config
from vqcore.plugin import Component, Plugin, hookimpl


class Late:
    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        pass

    @hookimpl
    def vqcore_step_endet(self, step): ...


class Rough:
    num_steps = 0

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        scale: float = 1.0
        "How rough."

    def __init__(self, cfg): ...
    def add_noise(self, x, eps, t): return x
    def target(self, x, eps, t): return x
    def sampler(self, steps): ...


class Needy(Rough):
    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        scale: float
        "Required: nobody can build it without knowing more."


@hookimpl
def vqcore_plugin():
    return Plugin(1, "mine", (
        Component("hook", "late", ":Late", "misspelt"),
        Component("scheduler", "rough", ":Rough", "no steps"),
        Component("scheduler", "needy", ":Needy", "not built"),
    ))
"""


def test_plugins_check_runs_what_needs_no_wiring(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    catalogue = Registry()
    catalogue.add_file(str(tmp_path / "mine.py"))
    hook, scheduler = checks.check_plugin(catalogue, "local")
    assert hook.startswith("local/late: hook law: ")
    assert "vqcore_step_endet" in hook
    assert scheduler == "local/rough: steps law: num_steps is 0"


# Optional members


@pytest.mark.parametrize(
    ("kind", "wrong", "meant"),
    [
        ("quantizer", "grid_ouy", "grid_out"),  # another letter
        ("modality", "picutre", "picture"),  # two letters swapped
        ("modality", "hole_vaule", "hole_value"),
        ("modality", "wirte", "write"),
        ("modality", "ismask", "is_mask"),  # a letter missing
        ("encoder", "fetchs", "fetch"),  # a letter too many
        ("encoder", "ifetch", "fetch"),
        ("decoder", "is_denoser", "is_denoiser"),
        ("decoder", "conditon", "condition"),
        ("objective", "need_denoiser", "needs_denoiser"),
        ("metric", "beter", "better"),
    ],
)
def test_a_misspelt_member_is_found(kind, wrong, meant):
    assert misspelt_members(kind, type("Odd", (), {wrong: 1})) == {wrong: meant}
    made = SimpleNamespace(**{wrong: 1})
    assert misspelt_members(kind, made) == {wrong: meant}


@pytest.mark.parametrize(
    "name", ["grid_out", "_grid_ouy", "gird_ouy", "grid", "token", "train", "dim", "decode"]
)
def test_other_names_are_no_misspelt_members(name):
    assert misspelt_members("quantizer", type("Fine", (nn.Module,), {name: 1})) == {}


class Slipping(Quantizer):
    """Holds a misspelt name that only an object has."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.register_buffer("without_deacy", torch.zeros(2))


@pytest.mark.parametrize(
    ("check", "make", "wrong"),
    [
        (checks.check_quantizer, variant(Quantizer, grid_ouy=lambda self, grid: grid), "grid_ouy"),
        (checks.check_quantizer, Slipping, "without_deacy"),
        (modality, variant(Modality, picutre=Modality.picture), "picutre"),
        (metric, variant(Metric, in_unit=True), "in_unit"),
        (encoder, variant(Encoder, fecth=lambda self: None), "fecth"),
    ],
)
def test_the_kit_warns_about_a_misspelt_member(check, make, wrong):
    with pytest.warns(
        MisspeltMember, match=f"has '{wrong}', one letter off '.*', an optional member of an? "
    ):
        check(make())


def test_plugins_check_warns_about_a_misspelt_member(installed, capsys):
    catalogue = installed("slips")
    quantizer, modality = checks.plugin_warnings(catalogue, "slips")
    assert quantizer == (
        "slips/scales: Scales has 'grid_ouy', one letter off 'grid_out', an optional member of a quantizer. vqcore "
        "does not read 'grid_ouy': rename it to 'grid_out', or give it a name that differs more."
    )
    assert modality.startswith("slips/radar: Radar has 'picutre', one letter off 'picture', ")
    assert main(["plugins", "--check", "slips"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-3:] == [
        f"WARNING {quantizer}",
        f"WARNING {modality}",
        "checked: manifest, targets, settings and protocols",
    ]


def test_no_installed_component_is_suspected():
    suspects = [text for id in registry().ids() for text in checks.plugin_warnings(registry(), id)]
    assert suspects == []


def test_a_component_has_all_members_of_an_optional_protocol_or_none():
    with pytest.raises(AssertionError, match="OddModality has write but lacks written; these members belong"):
        modality(variant(Modality, write=Writing.write)())
    with pytest.raises(AssertionError, match="OddModality has is_mask but lacks mask_value"):
        modality(variant(Modality, is_mask=True)())


@pytest.mark.slow
def test_an_optional_member_is_looked_up_in_one_place():
    """No other code of ours asks for an optional member by a string, which nobody would check."""
    names = {name for kind in protocols.OPTIONAL for name in protocols.optional_members(kind)}
    names -= {"read"}  # of every open file
    roots = [ROOT / "vqcore", *ROOT.glob("plugins/*/vqcore_*"), ROOT / "examples", ROOT / "benchmarks"]
    elsewhere, here = [], set()
    for path in (path for root in roots for path in root.rglob("*.py") if "tests" not in path.parts):
        for node in ast.walk(ast.parse(path.read_text())):
            asked = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr")
            name = getattr(node.args[1], "value", None) if asked else None
            if asked and path == ROOT / "vqcore" / "protocols.py":
                here.add(name)
            elif name in names:
                elsewhere.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert elsewhere == []
    assert {name for name in here if name} <= names


# The kit as a whole


SAYS = {"finite", "close", "same_state", "check_gradients", "check_bf16", "check_restored", "check_members"}
"""Functions of the kit that say which law is broken, for whoever calls them."""


def places_of_laws(name):
    """First and last line of every statement of a kit module that can fail a component."""
    tree = ast.parse((Path(checks.__file__).parent / name).read_text())
    for node in ast.walk(tree):
        called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.value.func
        fails = isinstance(node, ast.Assert | ast.Raise) or getattr(called, "id", None) in SAYS
        if fails:
            yield node.lineno, node.end_lineno


@pytest.mark.slow
def test_every_line_of_the_kit_that_can_fail_has_a_toy_that_makes_it_fail(toy):
    """Mutation coverage: the tables above (hooks and formats have tests of their own) reach every law."""
    reached = set()
    for check, make, text in BAD:
        reached |= broken(check, make(), text)
    for make, text in OBJECTIVES:
        reached |= broken(objective, make(), text)
    runs = ast.parse((Path(checks.__file__).parent / "runs.py").read_text())
    own = {"check_observer", "check_format", "_check_reading", "_filled", "_check_config", "_check_published"}
    own |= {"_check_families", "_check_family"}
    own |= {"_refuses"}
    elsewhere = [
        (node.lineno, node.end_lineno)
        for node in runs.body
        if isinstance(node, ast.FunctionDef) and node.name in own
    ]
    missing = []
    for name in ("networks.py", "quantizers.py", "samples.py", "files.py", "runs.py"):
        for first, last in places_of_laws(name):
            if name == "runs.py" and any(a <= first <= b for a, b in elsewhere):
                continue
            if not any((name, line) in reached for line in range(first, last + 1)):
                missing.append(f"{name}:{first}")
    assert not missing, " ".join(missing)


def test_every_kind_has_a_class():
    kinds = {cls.kind for cls in vars(conformance).values() if isinstance(cls, type) and hasattr(cls, "kind")}
    assert set(KINDS) <= kinds


def test_the_documentation_lists_every_optional_member():
    page = (ROOT / "docs" / "write-a-plugin.md").read_text()
    section = page.partition("## Optional members")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ") and "`" in line]
    listed = [
        (kind.strip(), name)
        for kinds, names in rows
        for kind in kinds.split(",")
        for name in re.findall(r"`(\w+)", names)
    ]
    table = [(kind, name) for kind in protocols.OPTIONAL for name in protocols.optional_members(kind)]
    assert sorted(listed) == sorted(table)


def test_noise_is_the_same_everywhere():
    assert torch.equal(noise(3, 2), noise(3, 2))
    assert not torch.equal(noise(3, 2), noise(3, 2, seed=1))


def test_the_documentation_names_every_class_and_every_law_that_can_be_waived():
    text = (ROOT / "docs" / "testing.md").read_text()
    classes = [name for name, cls in vars(conformance).items() if hasattr(cls, "test_manifest")]
    waivable = {
        *WAIVABLE,
        *MODALITY_WAIVABLE,
        *TEXT_WAIVABLE,
        *METRIC_WAIVABLE,
        *SCHEDULER_WAIVABLE,
        *OBJECTIVE_WAIVABLE,
    }
    assert [name for name in classes if name not in text] == []
    assert [law for law in sorted(waivable) if f"`{law}`" not in text] == []
