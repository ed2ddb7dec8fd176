"""Use of the codebook: over a whole evaluation set, and over the last tokens of training."""

import math
from collections.abc import Mapping
from itertools import chain

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from vqcore import dist
from vqcore.protocols import Quantizer

WINDOW = 65_536
"""The number of last tokens in training over which the use of a codebook is measured."""

DENSE = 2**22
"""Codebooks up to this size have a counter for every code; for larger ones only codes that occur are counted."""

COLLAPSE = 0.1
"""A codebook has collapsed when less than this share is used, of the codes that window and data could show."""

FILL = 4
"""Tokens for each code, in training so far and in the data, that are necessary before unused codes are reported."""

EVEN = 0.02
"""The codes of an evaluation have collapsed when their perplexity is below this share of the largest possible one."""

COLLAPSED, RECOVERED = "codebook collapse", "codebook recovered"
"""Events of a run; the second one ends the first."""

_REMEDY = (
    "Try another optim.lr (a low learning rate can be the cause, too), a smaller codebook, dead-code replacement, a "
    "smaller latent_dim, or quant/fsq;"
)

_REMEDY_IMPLICIT = (
    "The codes are fixed, so no code is dead: the encoder reaches only a part of them. Train longer, try another "
    "optim.lr (a low learning rate can be the cause, too), or use fewer codes (levels, bits);"
)


def learns_codes(quantizer: Quantizer) -> bool:
    """Whether a quantizer has a table with one row for each code. (In implicit codebooks, as of FSQ, no code dies.)"""
    tensors = (
        chain(quantizer.parameters(), quantizer.buffers()) if isinstance(quantizer, torch.nn.Module) else ()
    )
    return any(tensor.ndim >= 2 and quantizer.codebook_size in tensor.shape for tensor in tensors)


def reachable(tokens: int, codebook_size: int) -> tuple[float, float]:
    """Usage and perplexity that `tokens` codes, drawn evenly from the codebook, have on average.

    The perplexity is e to the mean entropy. With M other draws of the same code, the entropy of N draws is on average
    ln N - E[ln(1 + M)], where M is binomial with N - 1 draws.
    """
    tokens, share = max(1, tokens), 1 / codebook_size
    usage = 1.0 if codebook_size == 1 else -math.expm1(tokens * math.log1p(-share))
    others, mean = tokens - 1, (tokens - 1) * share
    spread = 12 * math.sqrt(mean) + 12
    low, high = max(0, math.floor(mean - spread)), min(others, math.ceil(mean + spread))
    m = torch.linspace(low, high, min(high - low + 1, 20_001), dtype=torch.float64).round()
    if codebook_size == 1:
        return usage, 1.0
    whole = torch.tensor(float(others), dtype=torch.float64)
    logs = torch.lgamma(whole + 1) - torch.lgamma(m + 1) - torch.lgamma(whole - m + 1)
    chances = (logs + m * math.log(share) + (whole - m) * math.log1p(-share)).softmax(0)
    return usage, math.exp(math.log(tokens) - float((chances * m.log1p()).sum()))


def collapse(metrics: Mapping[str, float], fitted: bool = False) -> str:
    """A warning if the codes of a whole evaluation set have collapsed, else an empty text."""
    perplexity, possible = metrics["codes/perplexity"], metrics["codes/perplexity_possible"]
    if perplexity >= EVEN * possible:
        return ""
    page = "fit" if fitted else "quantizers"
    return (
        f"the codes have collapsed: their perplexity is {perplexity:.3g}, as of {perplexity:.3g} evenly used codes; it "
        f"could be {possible:,.0f}. Such codes keep little of a sample; docs/{page}.md says what helps."
    )


def chosen(codes: Int[Tensor, "b *grid q"], valid: Bool[Tensor, "b *grid"] | None) -> Int[Tensor, "n q"]:
    """The codes of a batch in one row, without those that are not valid."""
    codes = codes.detach()
    return rearrange(codes, "... q -> (...) q") if valid is None else codes[valid]


class CodeWindow:
    """The last tokens of training: how much of the codebook they use, and for how long the other codes are dead.

    `window` is the number of tokens over all processes; each process keeps its share. Memory is constant: the window,
    and one number for each code (none for codebooks above `DENSE`, where the age of dead codes is unknown). A code is
    dead when it does not occur in the window. Its age is the number of steps since it last occurred, or since the
    start. `learned` says that every code has its own parameters. `tokens` is the number of tokens of the training data,
    if known.
    """

    def __init__(
        self,
        codebook_size: int,
        num_codebooks: int,
        window: int = WINDOW,
        *,
        learned: bool = True,
        tokens: int | None = None,
    ):
        self.codebook_size, self.window, self.learned, self.tokens = codebook_size, window, learned, tokens
        share = max(1, window // dist.world_size())
        self.codes = torch.full((share, num_codebooks), -1, dtype=torch.int32)
        self.last_seen = torch.zeros(
            num_codebooks, codebook_size if codebook_size <= DENSE else 0, dtype=torch.int32
        )
        self.position, self.taken, self.collapsed = 0, 0, False

    @property
    def held(self) -> int:
        """How many tokens the windows of all processes hold now; `window` when they are full."""
        return int((self.codes[:, 0] >= 0).sum()) * dist.world_size()

    def add(
        self, codes: Int[Tensor, "b *grid q"], step: int = 0, *, valid: Bool[Tensor, "b *grid"] | None = None
    ) -> None:
        """Add the codes of step number `step` (from 0) that are `valid`; the oldest codes leave the window."""
        new = chosen(codes, valid).to("cpu", torch.int32)
        for book, column in enumerate(new.T if self.last_seen.numel() else ()):
            self.last_seen[book, column.long()] = step + 1
        self.taken += len(new)
        new = new[-len(self.codes) :]
        places = (self.position + torch.arange(len(new))) % len(self.codes)
        self.codes[places] = new
        self.position = (self.position + len(new)) % len(self.codes)

    def metrics(self, step: int | None = None) -> dict[str, float]:
        """Metrics over the windows of all processes, means over codebooks, after `step` steps.

        `codes/usage` (share of the codebook that occurs; the other codes are dead), `codes/perplexity`, and with a step
        `codes/dead_age` (median age of the dead codes in steps; 0 if no code is dead).
        """
        seen = CodeCounts(self.codebook_size, self.codes.shape[1])
        for book in range(self.codes.shape[1]):
            seen.add_column(book, self._column(book))
        everywhere = seen.summed()
        found = everywhere.metrics()
        if step is not None and self.last_seen.numel():
            ages = step - dist.max_(self.last_seen.clone())
            dead = torch.ones_like(ages, dtype=torch.bool)
            for book, ids in enumerate(everywhere.ids):
                dead[book, ids] = False
            found["codes/dead_age"] = float(ages[dead].median()) if dead.any() else 0.0
        return found

    def change(self, metrics: Mapping[str, float]) -> tuple[str, str] | None:
        """Event and sentence when a full window begins to use too little of the codebook, or no longer does.

        There is no collapse before training had `FILL` tokens for each code. Small data sets are expected to use less.
        """
        usage, size = metrics["codes/usage"], self.codebook_size
        full = bool((self.codes[-1] >= 0).all())
        ripe = full and self.taken * dist.world_size() >= FILL * min(size, self.window)
        in_data = self.window if self.tokens is None else self.tokens / FILL
        enough = min(1.0, self.window / size, in_data / size)
        was, limit = self.collapsed, 2 * COLLAPSE if self.collapsed else COLLAPSE
        self.collapsed = ripe and usage < limit * enough
        if was == self.collapsed:
            return None
        seen = f"{usage:.1%} of {size:,} codes occur in the last {self.held:,} tokens"
        seen = f"{seen} (perplexity {metrics['codes/perplexity']:.0f})"
        if was:
            return RECOVERED, f"the codebook is in use again: {seen}."
        remedy = _REMEDY if self.learned else _REMEDY_IMPLICIT
        return COLLAPSED, (
            f"the codebook has collapsed: {seen}. {remedy} docs/quantizers.md says how to choose."
        )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        numbers = {"position": self.position, "taken": self.taken, "collapsed": int(self.collapsed)}
        counters = {name: torch.tensor(value) for name, value in numbers.items()}
        return {"codes": self.codes, "last_seen": self.last_seen, **counters}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned; a window of another size stays empty.

        Raises `ValueError` for codes that do not exist.
        """
        if state and state["codes"].shape == self.codes.shape:
            least, most = state["codes"].aminmax()
            if least < -1 or most >= self.codebook_size or state["last_seen"].shape != self.last_seen.shape:
                raise ValueError(
                    f"the window has codes from {least} to {most}, not -1 to {self.codebook_size - 1}"
                )
            self.codes, self.last_seen = state["codes"].clone(), state["last_seen"].clone()
            self.position = int(state["position"])
            self.taken, self.collapsed = int(state["taken"]), bool(state["collapsed"])

    def counts(self) -> list[Int[Tensor, " k"]]:
        """Counts of each code of each codebook in this process's window; above `DENSE` only of codes that occur."""
        columns = [self._column(book) for book in range(self.codes.shape[1])]
        if self.codebook_size > DENSE:
            return [column.unique(return_counts=True)[1] for column in columns]
        return [torch.bincount(column, minlength=self.codebook_size) for column in columns]

    def _column(self, book: int) -> Int[Tensor, " n"]:
        column = self.codes[:, book].long()
        return column[column >= 0]


class CodeCounts:
    """Counts of each code of each codebook; only codes that occurred are stored, so a codebook may be very large."""

    def __init__(self, codebook_size: int, num_codebooks: int):
        self.codebook_size = codebook_size
        self.ids = [torch.zeros(0, dtype=torch.int64) for _ in range(num_codebooks)]
        self.times = [torch.zeros(0, dtype=torch.int64) for _ in range(num_codebooks)]

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return int(self.times[0].sum())

    def add(self, codes: Int[Tensor, "b *grid q"], valid: Bool[Tensor, "b *grid"] | None = None) -> None:
        """Add a batch's codes, those that are `valid`."""
        for book, column in enumerate(chosen(codes, valid).cpu().T):
            self.add_column(book, column)

    def add_column(self, book: int, column: Int[Tensor, " n"]) -> None:
        """Add codes of one codebook."""
        self._merge(book, *column.unique(return_counts=True))

    def summed(self) -> "CodeCounts":
        """The counts of all processes together."""
        if self.codebook_size <= DENSE:
            return self._summed_dense()
        total = CodeCounts(self.codebook_size, len(self.ids))
        for part in dist.gathered((self.ids, self.times)):
            for book, (ids, times) in enumerate(zip(*part)):
                total._merge(book, ids, times)
        return total

    def metrics(self) -> dict[str, float]:
        """Usage, perplexity and entropy of all codes that were counted; means over codebooks.

        With the share p of each code: usage is the number of codes that occurred over the size of the codebook, the
        entropy is the sum of -p log2 p, in bits, and the perplexity is 2 to this power.
        """
        usage, entropy = [], []
        for times in self.times:
            share = times.double() / times.sum().clamp(min=1)
            usage.append(len(times) / self.codebook_size)
            entropy.append(float(-(share * share.log2()).sum()))
        return {
            "codes/usage": math.fsum(usage) / len(usage),
            "codes/perplexity": math.fsum(2**bits for bits in entropy) / len(entropy),
            "codes/entropy": math.fsum(entropy) / len(entropy),
        }

    def by_code(self) -> list[Int[Tensor, " k"]]:
        """One count for each code of each codebook; above `DENSE` only for codes that occurred."""
        if self.codebook_size > DENSE:
            return self.times
        dense = [torch.zeros(self.codebook_size, dtype=torch.int64) for _ in self.ids]
        for counts, ids, times in zip(dense, self.ids, self.times):
            counts[ids] = times
        return dense

    def _summed_dense(self) -> "CodeCounts":
        total = CodeCounts(self.codebook_size, len(self.ids))
        for book, counts in enumerate(self.by_code()):
            dist.sum_(counts)
            total.ids[book] = counts.nonzero().flatten()
            total.times[book] = counts[total.ids[book]]
        return total

    def _merge(self, book: int, ids: Int[Tensor, " n"], times: Int[Tensor, " n"]) -> None:
        joined, places = torch.cat([self.ids[book], ids]).unique(return_inverse=True)
        sums = torch.zeros(len(joined), dtype=torch.int64)
        self.times[book] = sums.index_add_(0, places, torch.cat([self.times[book], times]))
        self.ids[book] = joined
