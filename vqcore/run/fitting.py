"""Fits the quantizer of a run to its training samples, instead of training it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vqcore.console import ProgressLine
from vqcore.data.feed import Feed
from vqcore.errors import ConfigError
from vqcore.protocols import fitter
from vqcore.rng import generator
from vqcore.run.state import Run
from vqcore.tokenizer import cells


@torch.no_grad()
def fit_quantizer(run: Run) -> dict[str, str]:
    """Fit the quantizer to the latents of the training stream; returns its facts, as text by name.

    The encoder has no weights, the decoder none but its last layer, and the projection becomes the identity. Raises
    `ConfigError` for other parts, and what the quantizer raises for its latents.
    """
    tokenizer, cfg = run.tokenizer, run.config.model
    quantizer = fitter(tokenizer.quantizer)
    if quantizer is None:
        raise ConfigError(
            f"model.quantizer.name={cfg.quantizer.name}: this quantizer is trained and not fitted. Run: vqcore train "
            "CONFIG, or take one that is fitted, e.g. fit/kmeans, fit/scalar or fit/fast"
        )
    if any(True for _ in tokenizer.get_submodule("encoder").parameters()):
        raise ConfigError(
            f"model.encoder.name={cfg.encoder.name}: has weights, and vqcore fit trains nothing. Take an encoder "
            "without weights, e.g. fit/patches or fit/dct"
        )
    if tokenizer.embed is not None:
        raise ConfigError(
            f"model.embed_dim={cfg.embed_dim}: an embedding of classes is learned, and vqcore fit trains nothing. Set "
            "model.embed_dim=null, which gives each class a channel"
        )
    _identity(tokenizer.proj, cfg.quantizer.name)
    decoder = tokenizer.decoder
    if any(parameter is not decoder.last_layer for parameter in decoder.parameters()):
        raise ConfigError(
            f"model.decoder.name={cfg.decoder.name}: has weights, and vqcore fit trains nothing. Take fit/patches or "
            "fit/dct; another decoder can be trained on the codes afterwards (model.full_ckpt, model.freeze_enc)"
        )
    tokenizer.eval()
    latents = _Latents(run)
    facts = quantizer.fit(latents, generator(run.seed, "fit"))
    return {"samples": f"{latents.samples:,}", **facts}


def _identity(proj: nn.Linear, name: str) -> None:
    if proj.in_features != proj.out_features:
        raise ConfigError(
            f"model.quantizer ({name}): takes {proj.out_features} values, but the encoder gives {proj.in_features} at "
            f"each position. Set model.quantizer.latent_dim={proj.in_features}"
        )
    nn.init.eye_(proj.weight)
    nn.init.zeros_(proj.bias)


class _Latents:
    """The latents of the training stream with their masks, batch by batch, as often as they are asked for.

    With `run.epochs` exactly so many passes, else the samples of `run.steps` steps. `samples` is their number.
    """

    def __init__(self, run: Run):
        self.run, epochs = run, run.config.run.epochs
        self.samples = round(epochs * len(run.data)) if epochs else run.steps * run.total_batch
        self.has_passed = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        run, left = self.run, self.samples
        with (
            Feed(run.config, run.data, run.tokenizer.modality, run.extra, run.steps) as feed,
            ProgressLine("fit", run.steps, unit="batch") as line,
        ):
            for step in range(run.steps):
                for raw in feed.next(step):
                    batch = run.tokenizer.prepare(raw.part(slice(left)), run.extra)
                    left -= len(batch.keys)
                    if not self.has_passed:
                        run.constant.add(batch)
                    z = run.tokenizer.latents(batch.x)
                    yield z, None if batch.valid is None else cells(batch.valid, z.shape[1:-1])
                line.update(step + 1)
        self.has_passed = True
