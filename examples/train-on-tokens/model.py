"""A small autoregressive transformer on token stores of several modalities, and samples of it as codes.

    python examples/train-on-tokens/model.py runs/earth/tokens runs/earth/samples

The first folder holds a store for each modality, `rgb` and `depth`, which are joined by key. The second one gets a
folder of codes for each of them: `vqcore decode` makes files of these.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from vqcore.tokens import TokenDataset

MANIFEST = ("format", "fingerprint", "codebook_size", "num_codebooks", "grid", "size", "dtype")


class Words:
    """One vocabulary and one order for the codes of all modalities: modality after modality, each row by row.

    Modality number m has its words from `first[m]` on. The last word stands for the beginning.
    """

    def __init__(self, data: TokenDataset):
        self.shapes = {label: data[0][label].shape for label in data.stores}
        self.sizes = [data.manifests[label]["codebook_size"] for label in self.shapes]
        lengths = [shape.numel() for shape in self.shapes.values()]
        first = torch.tensor([0, *self.sizes]).cumsum(0)
        self.begin, self.count = int(first[-1]), int(first[-1]) + 1
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.length, self.lengths, self.offset = len(owner), lengths, first[owner]
        words = torch.arange(self.count)
        self.allowed = (words >= self.offset[:, None]) & (words < first[owner + 1][:, None])

    def of(self, codes: dict[str, Tensor]) -> Tensor:
        """Codes `(b, *grid, q)` of each modality as words `(b, length)`."""
        return torch.cat([each.flatten(1) for each in codes.values()], 1) + self.offset

    def codes(self, words: Tensor) -> dict[str, Tensor]:
        """Words as codes of each modality: the reverse of `of`."""
        parts = (words - self.offset).split(self.lengths, 1)
        return {label: part.reshape(-1, *shape) for (label, shape), part in zip(self.shapes.items(), parts)}


class Model(nn.Module):
    """Predicts every word from those before it: logits `(b, n, words)`, with -inf where a word cannot stand."""

    def __init__(self, words: Words, width: int = 96, depth: int = 3, heads: int = 4):
        super().__init__()
        self.word = nn.Embedding(words.count, width)
        self.place = nn.Parameter(0.02 * torch.randn(words.length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, words.count)
        self.allowed: Tensor
        self.register_buffer("allowed", words.allowed)

    def forward(self, before: Tensor) -> Tensor:
        n = before.shape[1]
        later = nn.Transformer.generate_square_subsequent_mask(n, device=before.device)
        x = self.layers(self.word(before) + self.place[:n], mask=later, is_causal=True)
        return self.head(x).masked_fill(~self.allowed[:n], -torch.inf)


def loss_of(model: Model, words: Tensor, begin: int) -> Tensor:
    """Cross-entropy of a batch in nats a word."""
    before = torch.cat([torch.full_like(words[:, :1], begin), words[:, :-1]], 1)
    return F.cross_entropy(model(before).flatten(0, 1), words.flatten())


def unigram(codes: dict[str, Tensor]) -> float:
    """The entropy of a word in nats, if only the frequencies of codes were known: the loss to beat."""
    total, count = 0.0, 0
    for each in codes.values():
        often = torch.bincount(each.flatten()).double()
        total -= float(torch.special.xlogy(often, often / often.sum()).sum())
        count += each.numel()
    return total / count


def train(
    model: Model, words: Words, data: TokenDataset, steps: int, batch: int, device: torch.device
) -> list[float]:
    """The loss of each step."""
    sampler = BatchSampler(RandomSampler(data, num_samples=steps * batch), batch, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for step, codes in enumerate(DataLoader(data, sampler=sampler, batch_size=None), 1):
        loss = loss_of(model, words.of(codes).to(device), words.begin)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}  loss {np.mean(losses[-20:]):.3f}", flush=True)
    return losses


@torch.no_grad()
def sampled(model: Model, words: Words, count: int, device: torch.device) -> dict[str, Tensor]:
    """New samples as codes of each modality, word after word."""
    drawn = torch.full((count, 1), words.begin, device=device)
    for _ in range(words.length):
        chances = model(drawn)[:, -1].softmax(-1)
        drawn = torch.cat([drawn, torch.multinomial(chances, 1)], 1)
    return words.codes(drawn[:, 1:].cpu())


def save(codes: dict[str, Tensor], manifests: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """A file of codes for each sample, with the manifest by which `vqcore decode` knows their tokenizer."""
    for label, each in codes.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        made = {name: manifests[label][name] for name in MANIFEST}
        (folder / label / "tokens.json").write_text(json.dumps(made))
        for number, one in enumerate(each):
            np.save(folder / label / f"{number:02}.npy", one.numpy().astype(made["dtype"]))


def main(argv: list[str] | None = None) -> tuple[float, list[float]]:
    """Train and draw; returns the entropy by frequency, and the loss of each step."""
    parser = argparse.ArgumentParser(
        description="Train a small model of token stores and draw samples of it."
    )
    parser.add_argument("tokens", type=Path, help="a folder with a store for each modality")
    parser.add_argument("samples", type=Path, help="folder for the samples")
    parser.add_argument("--order", nargs="+", default=["rgb", "depth"], help="the modalities, in order")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--count", type=int, default=16, help="number of samples")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = TokenDataset({label: args.tokens / label for label in args.order})
    words = Words(data)
    model = Model(words).to(device)
    alone = unigram(data.batch(range(len(data))))
    print(
        f"{len(data)} rows of {words.length} words, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
    print(f"by the frequency of codes alone a word has {alone:.3f} nats")
    losses = train(model.train(), words, data, args.steps, args.batch, device)
    save(sampled(model.eval(), words, args.count, device), data.manifests, args.samples)
    print(f"{args.count} samples: {args.samples}")
    return alone, losses


if __name__ == "__main__":
    main()
