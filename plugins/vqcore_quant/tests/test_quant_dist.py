"""Two processes with half a batch each learn the same codebook as one process with the whole batch."""

import datetime

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from vqcore_quant.vq import VQ

from vqcore import dist

CASES = {
    "cosine": {},
    "euclidean": {"normalize": False},
    "cosine-split": {"dead_code": "linde_buzo_gray"},
    "euclidean-split": {"normalize": False, "dead_code": "linde_buzo_gray"},
    "cosine-kmeans": {"kmeans_init": True},
    "euclidean-kmeans": {"kmeans_init": True, "normalize": False},
    "shared-heads": {"num_codebooks": 2},
    "separate-heads": {"num_codebooks": 2, "shared_codebook": False, "normalize": False},
    "separate-kmeans": {"num_codebooks": 2, "shared_codebook": False, "kmeans_init": True},
    "learned": {"codebook": "learned", "normalize": False},
    "learned-even": {"codebook": "learned", "entropy_weight": 1.0, "entropy_temperature": 0.3},
    "learned-separate": {
        "codebook": "learned",
        "num_codebooks": 2,
        "shared_codebook": False,
        "orthogonal_weight": 1.0,
    },
}
STEPS = 12
BROKEN = 5


def batch(step):
    """Latents and mask of 5 samples; one process gets 2 samples, the other process gets 3."""
    generator = torch.Generator().manual_seed(step)
    z = 2 * torch.randn(5, 6, 4, 8, generator=generator)
    if step == BROKEN:
        z[4, 0, 0, 0] = torch.nan
    return z, torch.rand(5, 6, 4, generator=generator) < 0.7


def build(settings):
    torch.manual_seed(0)
    return VQ(VQ.Config(codebook_size=32, latent_dim=8, decay=0.9, coef_ema_dead_code=2.0, **settings))


def learn(quantizer, part, seed):
    torch.manual_seed(seed)  # only the random numbers of rank 0 may matter
    history = []
    for step in range(STEPS):
        z, mask = batch(step)
        out = quantizer(z[part], mask[part])
        if step != BROKEN:
            descend(quantizer, out.losses, share=mask[part].sum() / mask.sum())
        history.append((out.codes, quantizer.embed.detach().clone(), out.metrics["codes/dead"]))
    return history, quantizer.state_dict()


def descend(quantizer, losses, share):
    """One gradient step on the codes, with averaged gradients as in DDP; `share` is this process's share of latents."""
    world = dist.world_size()
    for parameter in quantizer.parameters():
        loss = share * world * losses["vq/codebook"] + losses.get("vq/orthogonal", 0)
        if "vq/entropy" in losses:
            loss = loss + losses["vq/entropy"]
        (slope,) = torch.autograd.grad(loss, parameter)
        with torch.no_grad():
            parameter -= 5 * dist.sum_(slope) / world


def work(rank, folder):
    torch.set_num_threads(1)
    early = build({})  # before the process group exists
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        # On a busy machine one process may start minutes after the other.
        timeout=datetime.timedelta(minutes=10),
    )
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    results = {name: learn(build(settings), part, seed=1 + rank) for name, settings in CASES.items()}
    results["early"] = learn(early, part, seed=1 + rank)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # no process closes the group while the other process still communicates
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", [*CASES, "early"])
def test_two_processes_equal_one(two, name):
    one, state = learn(build(CASES.get(name, {})), slice(0, 5), seed=1)
    (first, first_state), (second, second_state) = two[0][name], two[1][name]
    assert any(dead > 0 for _, _, dead in one)
    assert torch.equal(one[BROKEN][1], one[BROKEN - 1][1])
    for (codes, embed, dead), (codes0, embed0, dead0), (codes1, embed1, _) in zip(
        one, first, second, strict=True
    ):
        assert torch.equal(torch.cat([codes0, codes1]), codes)
        assert torch.equal(embed0, embed1)
        assert (embed0 - embed).abs().max() <= 1e-6 * embed.abs().max()
        assert dead0 == dead
    for key in state:
        assert torch.equal(first_state[key], second_state[key])
        assert (first_state[key] - state[key]).abs().max() <= 1e-6 * state[key].abs().max()
