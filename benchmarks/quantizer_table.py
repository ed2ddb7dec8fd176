"""Compare all quantizers in the same small tokenizer, on the same photographs, at the same number of bits per token.

    python benchmarks/quantizer_table.py

The script trains the quickstart's tokenizer with each quantizer for a few hundred steps, as `vqcore train` does, on
crops of 64 pixels (8 x 8 tokens of 10 bits). It prints the table of `docs/quantizers.md`: PSNR on held-out photographs
(crops of 192 pixels), and the use of codes over the last 65,536 training tokens. The ranking holds only for this setup:
short runs, one width, one data set.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vqcore.compose.layers import load
from vqcore.schema import RunConfig
from vqcore.trainer import train

ROOT = Path(__file__).resolve().parents[1]
BITS = 10
VQ = "name: quant/vq, latent_dim: 8, normalize: false, decay: 0.97, commitment_weight: 0.1"
QUANTIZERS = {
    "vq": f"{{{VQ}, codebook_size: 1024}}",
    "fsq": "{name: quant/fsq, levels: 8-8-4-4}",
    "lfq": "{name: quant/lfq, codebook_size: 1024}",
    "bsq": "{name: quant/bsq, codebook_size: 1024}",
    "simvq": "{name: quant/simvq, codebook_size: 1024, latent_dim: 8}",
    "ibq": "{name: quant/ibq, codebook_size: 1024, latent_dim: 8}",
    "memcodes 2 x 5 bits": "{name: quant/memcodes, codebook_size: 32, num_codebooks: 2, latent_dim: 8}",
    "residual 2 x 5 bits (vq)": f"{{name: quant/residual, depth: 2, quantizer: {{{VQ}, codebook_size: 32}}}}",
    "product 2 x 5 bits (vq)": (
        f"{{name: quant/product, groups: 2, quantizer: {{{VQ.replace('latent_dim: 8', 'latent_dim: 4')}, "
        "codebook_size: 32}}"
    ),
}


def main() -> None:
    """Train and measure each quantizer, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("only", nargs="*", help=f"names of quantizers (default: {', '.join(QUANTIZERS)})")
    parser.add_argument("--steps", type=int, default=250, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each quantizer, with seeds 0, 1, ...")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{BITS} bits per token, {args.steps} steps, {args.seeds} seeds, torch {torch.__version__}, 1 thread\n"
    )
    print("| quantizer | PSNR, dB (by seed) | codes used | perplexity | CPU seconds |")
    print("| --- | --- | --- | --- | --- |")
    for name in args.only or QUANTIZERS:
        runs = [_run(QUANTIZERS[name], args.steps, seed) for seed in range(args.seeds)]
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        by_seed = " / ".join(f"{run['psnr']:.2f}" for run in runs)
        print(
            f"| {name} | **{mean['psnr']:.2f}** ({by_seed}) | {100 * mean['usage']:.0f} % "
            f"| {mean['perplexity']:.0f} | {mean['seconds']:.0f} |",
            flush=True,
        )


def _run(quantizer: str, steps: int, seed: int) -> dict[str, float]:
    """PSNR of the last evaluation, use of codes over the last 65,536 training tokens, and CPU seconds of one run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = (
            f"model.quantizer={quantizer}",
            f"data.path={ROOT / 'data/photos/train'}",
            f"data.eval_path={ROOT / 'data/photos/heldout'}",
            "data.input_size=64",
            "data.batch_size=8",
            "eval.sizes=[192]",
            f"run.dir={Path(folder) / 'run'}",
            f"run.steps={steps}",
            f"run.seed={seed}",
            f"run.save_every={steps}",
            "run.threads=1",
            "optim.warmup=50",
        )
        config = load(str(ROOT / "cfgs/quickstart.yaml"), settings, schema=RunConfig).config
        start = time.process_time()
        run = train(config)
    metrics = run.progress.evaluation | run.window.metrics()
    return {
        "psnr": next(value for key, value in metrics.items() if key.endswith("metric/psnr")),
        "usage": metrics["codes/usage"],
        "perplexity": metrics["codes/perplexity"],
        "seconds": time.process_time() - start,
    }


if __name__ == "__main__":
    main()
