"""Do the optimizer's moments of a dead code harm the new code that replaces it?

    python benchmarks/revived_codes.py

A codebook trained by AdamW (`quant/vq`, `codebook: learned`) follows latents whose clusters move every 60 steps, so
that codes die and are replaced all the time. Each run is done twice: once as in training, and once with the moments of
every replaced code set to zero at the replacement. The script prints how far the old moments alone move a replaced
code, relative to the root mean square distance of latents to their codes, and the mean squared distance over the second
half of the run, over seeds. It takes about a minute on one thread.
"""

import statistics

import torch
from torch import Tensor
from vqcore_quant.vq import VQ

from vqcore.run.optim import parameter_groups

STEPS, SEEDS, CLUSTERS, DIM, CODES, LR, BETAS = 600, 6, 48, 8, 64, 1e-3, (0.9, 0.99)


def main() -> None:
    """Print one line for each `decay`: the smaller the decay, the faster a code counts as dead."""
    torch.set_num_threads(1)
    for decay in (0.99, 0.8):
        pairs = [
            (follow(seed, decay, forget=False), follow(seed, decay, forget=True)) for seed in range(SEEDS)
        ]
        carried = [share for (_, shares), _ in pairs for share in shares]
        kept, forgot = ([arm[0] for arm in arms] for arms in zip(*pairs, strict=True))
        ratios = [a / b for a, b in zip(kept, forgot, strict=True)]
        print(
            f"decay {decay}: {len(carried)} replaced codes; moved by old moments: "
            f"median {statistics.median(carried):.2%}, "
            f"largest {max(carried):.2%} of a latent's distance; mean squared distance {statistics.mean(kept):.4f}, "
            f"with moments set to zero {statistics.mean(forgot):.4f}; ratio {statistics.mean(ratios):.3f} "
            f"(by seed {min(ratios):.3f} to {max(ratios):.3f})"
        )


def follow(seed: int, decay: float, *, forget: bool) -> tuple[float, list[float]]:
    """Train on moving clusters. Returns the mean squared distance, and how far old moments move each replaced code."""
    torch.manual_seed(seed)
    cfg = VQ.Config(codebook_size=CODES, latent_dim=DIM, normalize=False, codebook="learned", decay=decay)
    quantizer = VQ(cfg)
    embed = quantizer.embed
    optimizer = torch.optim.AdamW(parameter_groups(quantizer, 0.05), lr=LR, betas=BETAS)
    centres, distances, carried = torch.randn(CLUSTERS, DIM), [], []
    for step in range(STEPS):
        if step % 60 == 0:
            centres[torch.randperm(CLUSTERS)[: CLUSTERS // 3]] = torch.randn(CLUSTERS // 3, DIM)
        z = centres[torch.randint(CLUSTERS, (4, 64))] + 0.1 * torch.randn(4, 64, DIM)
        before = embed.detach().clone()
        out = quantizer(z)
        revived = (embed.detach() != before).any(1)
        if optimizer.state and revived.any():
            typical = (DIM * float(out.metrics["codes/distance"])) ** 0.5
            carried += [length / typical for length in drift(optimizer.state[embed], revived)]
            if forget:
                for moment in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[embed][moment][revived] = 0
        optimizer.zero_grad()
        out.losses["vq/codebook"].backward()
        optimizer.step()
        distances.append(float(out.metrics["codes/distance"]))
    return statistics.mean(distances[STEPS // 2 :]), carried


def drift(state: dict[str, Tensor], rows: Tensor) -> list[float]:
    """How far the moments alone would move these rows if no further gradient came."""
    momentum, square, done = state["exp_avg"][rows], state["exp_avg_sq"][rows], float(state["step"])
    total = torch.zeros_like(momentum)
    for later in range(1, 100):
        mean = momentum * BETAS[0] ** later / (1 - BETAS[0] ** (done + later))
        spread = square * BETAS[1] ** later / (1 - BETAS[1] ** (done + later))
        total -= LR * mean / (spread.sqrt() + 1e-8)
    return total.norm(dim=1).tolist()


if __name__ == "__main__":
    main()
