"""The figure a learned tokenizer must beat: k-means on raw patches, as many codes of the same size, the same data.

    python benchmarks/patch_kmeans.py runs/quickstart

Takes the crops of the run's own training stream, cuts them into as many patches as the tokenizer has tokens, fits
as many centres as its codebook has codes (Lloyd's algorithm), rebuilds the run's evaluation crops from the nearest
centres and prints both PSNRs: of the codes that the encoder chooses, and of those that a search finds
(`docs/refine.md`; k-means is searched to the end already, since its patches do not overlap). Images only.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from einops import rearrange
from torch import Tensor
from vqcore_quant.assignment import nearest
from vqcore_quant.kmeans import kmeans

from vqcore.assembly import open_data
from vqcore.compose.build import from_tree
from vqcore.data.batches import TrainBatches
from vqcore.errors import DataError
from vqcore.evaluate.measure import eval_batches
from vqcore.metrics.pixels import PSNR
from vqcore.protocols import Data
from vqcore.registry import registry
from vqcore.rng import generator
from vqcore.schema import RunConfig
from vqcore.tokenizer import Tokenizer


def main() -> None:
    """Fit, rebuild, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("--crops", type=int, default=800, help="training crops to cut patches from")
    parser.add_argument("--iters", type=int, default=15, help="Lloyd iterations")
    parser.add_argument("--refine", type=int, default=2, help="sweeps of search for better codes")
    args = parser.parse_args()
    tree = yaml.safe_load((args.run / "config.yaml").read_text())
    config = from_tree(tree, schema=RunConfig, file=str(args.run / "config.yaml"))
    tokenizer = Tokenizer.load(args.run)
    data, eval_data = open_data(config, tokenizer.modality, {})
    if eval_data is None:
        raise DataError(f"{args.run} has no data.eval_path to compare on.")
    size, grid = tokenizer.cfg.size, tokenizer.grid()
    cut = {"ph": size[0] // grid[0], "pw": size[1] // grid[1]}

    def patches(x: Tensor) -> Tensor:
        return rearrange(x, "b c (h ph) (w pw) -> (b h w) (c ph pw)", **cut)

    x = _eval_crops(config, tokenizer, eval_data)
    shape = {"b": len(x), "h": grid[0], "w": grid[1], **cut}
    psnr = PSNR(PSNR.Config(), spec=tokenizer.spec)

    def fitted(crops: Tensor) -> float:
        size, chance = tokenizer.codebook_size, generator(0, "kmeans")
        centres, _ = kmeans(patches(crops), size, args.iters, cosine=False, generator=chance)
        codes = nearest(patches(x), centres, cosine=False)
        x_hat = rearrange(centres[codes], "(b h w) (c ph pw) -> b c (h ph) (w pw)", **shape)
        return psnr.summary(psnr.measure(x_hat, x))[""]

    crops = _train_crops(config, tokenizer, data, args.crops)
    found = {"": fitted(crops)}
    if getattr(config.data.modality, "color_jitter", 0):
        modality: Any = config.data.modality
        plain = registry().build("modality", replace(modality, color_jitter=0.0), size=tokenizer.cfg.size)
        found = {", colours jittered": found[""]}
        found[", colours as they are"] = fitted(_train_crops(config, tokenizer, data, args.crops, plain))
    sweeps = {"as encoded": 0, f"after {args.refine} sweeps of refinement": args.refine}
    rebuilt = {name: tokenizer.reconstruct(x, refine=count) for name, count in sweeps.items()}
    ours = {name: psnr.summary(psnr.measure(x_hat, x))[""] for name, x_hat in rebuilt.items()}
    tokens = grid[0] * grid[1]
    print(
        f"{tokens} codes of {tokenizer.bits_per_token:g} bits for {size[0]} x {size[1]} pixels, "
        f"{len(x)} held-out crops, mean PSNR in dB"
    )
    for kind, theirs in found.items():
        print(f"  k-means on {len(crops) * tokens} raw patches{kind}, {args.iters} iterations: {theirs:.2f}")
        for name, figure in ours.items():
            print(f"    this tokenizer {name + ':':32} {figure:.2f}  ({figure - theirs:+.2f})")
    figures = {"psnr": ours, "kmeans_psnr": found, "crops": args.crops, "iters": args.iters}
    (args.run / "kmeans.json").write_text(json.dumps(figures, indent=2) + "\n")


def _train_crops(
    config: RunConfig, tokenizer: Tokenizer, data: Data, count: int, modality: Any = None
) -> Tensor:
    steps = -(-count // config.data.batch_size)
    loader = TrainBatches(
        data,
        modality or tokenizer.modality,
        {},
        config.data,
        seed=config.run.seed,
        start_step=0,
        steps=steps,
        accumulate=1,
        rank=0,
        world=1,
    )
    return torch.cat([loaded.batch.x for loaded in loader if loaded.batch])[:count]


def _eval_crops(config: RunConfig, tokenizer: Tokenizer, data: Data) -> Tensor:
    batches = eval_batches(tokenizer, config, data, {})
    return torch.cat([loaded.batch.x for loaded in batches if loaded.batch])


if __name__ == "__main__":
    main()
