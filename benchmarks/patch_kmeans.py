"""The PSNR that a learned tokenizer must beat: k-means on raw patches, with as many codes of the same size.

    python benchmarks/patch_kmeans.py runs/quickstart

Takes the crops of the run's own training stream and cuts them into as many patches as the tokenizer has tokens. Fits as
many centres as the codebook has codes (Lloyd's algorithm). Rebuilds the run's evaluation crops from the nearest centres
and prints the PSNR of k-means and of the tokenizer. Images only.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from vqcore_quant.assignment import nearest
from vqcore_quant.kmeans import kmeans

from vqcore.assembly import open_data
from vqcore.compose.build import from_tree, saved_tree
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
    args = parser.parse_args()
    file = args.run / "config.yaml"
    config = from_tree(saved_tree(file), schema=RunConfig, file=str(file))
    tokenizer = Tokenizer.load(args.run)
    if not config.data.has_eval:
        raise DataError(f"{args.run} has no data.eval_path to compare on.")
    data, eval_data = (open_data(config, tokenizer.modality, {}, split) for split in ("train", "eval"))
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
    ours = psnr.summary(psnr.measure(tokenizer.reconstruct(x), x))[""]
    facts = tokenizer.facts()
    print(
        f"{facts.tokens} codes of {facts.bits_per_token:g} bits for {size[0]} x {size[1]} pixels, "
        f"{len(x)} held-out crops, mean PSNR in dB"
    )
    for kind, theirs in found.items():
        patches_of = f"{len(crops) * facts.tokens} raw patches{kind}"
        print(f"  k-means on {patches_of}, {args.iters} iterations: {theirs:.2f}")
        print(f"    this tokenizer: {ours:.2f}  ({ours - theirs:+.2f})")
    metrics = {"psnr": ours, "kmeans_psnr": found, "crops": args.crops, "iters": args.iters}
    (args.run / "kmeans.json").write_text(json.dumps(metrics, indent=2) + "\n")


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
