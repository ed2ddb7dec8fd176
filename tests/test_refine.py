"""Refined codes against exhaustive search and the laws: never worse, no matter the batch, nothing learned."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import run_config, toy  # noqa: F401

from vqcore.assembly import tokenizer_config_of
from vqcore.errors import ConfigError
from vqcore.refine import _turns, refine
from vqcore.rng import generator
from vqcore.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("toy")


class Overlapping(nn.Module):
    """Every token reaches into its neighbours' part, so that no token is best chosen alone."""

    def __init__(self, rank: int, channels: int):
        super().__init__()
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        self.conv = kind(3, channels, 8, stride=4, padding=2)
        nn.init.normal_(self.conv.weight, std=0.5, generator=generator(0, "overlap"))

    def forward(self, z_q):
        return self.conv(z_q.movedim(-1, 1)).tanh()


def tokenizer_of(tmp_path, size=(16, 16), overlapping=True, **changes) -> Tokenizer:
    changes = {"data__modality__size": list(size), **changes}
    tokenizer = Tokenizer(tokenizer_config_of(run_config(tmp_path, **changes))).eval()
    if overlapping:
        tokenizer.decoder = Overlapping(len(size), tokenizer.spec.out_channels)
    return tokenizer


def samples(count: int, *size: int) -> torch.Tensor:
    return torch.rand(count, 2, *size, generator=generator(0, "samples")) * 2 - 1


def errors(tokenizer: Tokenizer, x, codes) -> torch.Tensor:
    return tokenizer.objective.error(tokenizer, tokenizer.lookup(codes), x).flatten(1).mean(1)


@pytest.mark.parametrize("size", [(32,), (16, 24), (8, 16, 8)])
def test_no_sample_gets_worse_and_most_get_better(tmp_path, size):
    tokenizer, x = tokenizer_of(tmp_path, size), samples(6, *size)
    plain = tokenizer.encode(x)
    before, after = (errors(tokenizer, x, codes) for codes in (plain, tokenizer.encode(x, refine=2)))
    assert (after <= before).all() and (after < 0.9 * before).sum() >= 4
    assert torch.equal(tokenizer.encode(x, refine=0), plain)


def test_it_comes_near_the_best_of_all_codes(tmp_path):
    tokenizer = tokenizer_of(tmp_path, (16,), model__quantizer__codebook_size=6)
    x = samples(12, 16)
    every = torch.tensor(list(product(range(6), repeat=4))).unsqueeze(-1)
    best = torch.stack([errors(tokenizer, one.expand(len(every), -1, -1), every).min() for one in x])
    with torch.no_grad():
        plain, found = (errors(tokenizer, x, tokenizer.encode(x, refine=sweeps)) for sweeps in (0, 3))
    assert (found >= best - 1e-6).all()
    assert (found - best).mean() < 0.5 * (plain - best).mean()


def test_the_step_needs_no_setting(tmp_path):
    # Whatever the scale of latents and output, the same codes: the curvature takes it out.
    tokenizer, x = tokenizer_of(tmp_path), samples(4, 16, 16)
    codes = tokenizer.encode(x, refine=1)
    start = tokenizer.encode(x)
    tokenizer.quantizer.embed.mul_(10)
    with torch.no_grad():
        tokenizer.decoder.conv.weight.div_(10)
        assert (refine(tokenizer, x, start, 1) == codes).float().mean() > 0.95


def test_a_sample_does_not_depend_on_its_batch(tmp_path):
    tokenizer, x = tokenizer_of(tmp_path), samples(3, 16, 16)
    together = tokenizer.encode(x, refine=1)
    assert all(torch.equal(tokenizer.encode(x[i : i + 1], refine=1), together[i : i + 1]) for i in range(3))


def test_nothing_learns(tmp_path):
    tokenizer, x = tokenizer_of(tmp_path), samples(2, 16, 16)
    state = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    tokenizer.encode(x, refine=1)
    assert all(torch.equal(value, state[key]) for key, value in tokenizer.state_dict().items())
    assert all(parameter.grad is None for parameter in tokenizer.parameters())


def test_what_is_not_valid_counts_nothing(tmp_path):
    tokenizer, x = tokenizer_of(tmp_path), samples(2, 16, 16)
    mask = torch.ones(2, 16, 16, dtype=torch.bool)
    mask[:, :, 9:] = False
    start = tokenizer.encode(x, mask)
    found = refine(tokenizer, torch.where(mask.unsqueeze(1), x, 9.0), start, 1, mask)
    assert torch.equal(found, refine(tokenizer, x, start, 1, mask))
    assert not torch.equal(found, start)


def test_class_maps(tmp_path):
    classes = {"data__modality__channels": 1, "data__modality__kind": "categorical"}
    tokenizer = tokenizer_of(tmp_path, **classes, data__modality__range=None, data__modality__labels=5)
    x = torch.randint(5, (4, 16, 16), generator=generator(0, "classes"))
    before, after = (errors(tokenizer, x, tokenizer.encode(x, refine=sweeps)) for sweeps in (0, 1))
    assert (after <= before).all() and after.mean() < before.mean()


class Bag(nn.Module):
    """Five tokens without a place, and a decoder that mixes them."""

    dim, needs_size = 6, True

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(2 * 64, 5 * 6), nn.Linear(5 * 3, 2 * 64)

    def grid(self, size):
        return (5,)

    def forward(self, x, size=None):
        if size is None:
            return self.inward(x.flatten(1)).view(-1, 5, 6)
        return self.outward(x.flatten(1)).view(-1, 2, *size)


def test_tokens_that_belong_to_no_place_are_judged_by_the_whole(tmp_path):
    tokenizer, x = tokenizer_of(tmp_path, (8, 8)), samples(4, 8, 8)
    tokenizer.encoder = tokenizer.decoder = Bag()
    before, after = (errors(tokenizer, x, tokenizer.encode(x, refine=sweeps)) for sweeps in (0, 1))
    assert (after <= before).all() and after.mean() < before.mean()


@pytest.mark.parametrize("grid", [(7,), (4, 5), (2, 3, 4)])
def test_every_position_has_its_turn_and_neighbours_have_different_ones(grid):
    turns = torch.stack(list(_turns(torch.Size(grid), len(grid), torch.device("cpu")))).long()
    assert torch.equal(turns.sum(0), torch.ones(grid, dtype=torch.int64))
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(grid) - 1]
    near = pool(F.pad(turns.unsqueeze(1).float(), (1, 1) * len(grid)), 3, stride=1) * 3 ** len(grid)
    assert near.max() < 1.5  # no position sees two that move at once


def test_inference_mode(tmp_path):
    tokenizer, x = tokenizer_of(tmp_path), samples(2, 16, 16)
    with torch.inference_mode():
        found = tokenizer.encode(x + 0, refine=1)
    assert torch.equal(found, tokenizer.encode(x, refine=1))


def test_what_cannot_be_refined_is_refused(tmp_path):
    tokenizer, x = tokenizer_of(tmp_path), samples(1, 16, 16)
    with pytest.raises(ValueError, match="refine=-1 is a number of sweeps"):
        tokenizer.encode(x, refine=-1)
    tokenizer.decoder = None
    with pytest.raises(ConfigError, match="loaded with encoder_only=True"):
        tokenizer.encode(x, refine=1)


def test_an_objective_that_draws_is_refused(tmp_path):
    tokenizer = tokenizer_of(tmp_path, overlapping=False, objective={"name": "toy/adversary"})
    with pytest.raises(ConfigError, match="'toy/adversary': it has no error to lower"):
        tokenizer.encode(samples(1, 16, 16), refine=1)
