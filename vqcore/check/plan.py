"""What the settings mean in numbers: parameters, tokens, learning rates, the size of the codebook beside the data."""

import math
from collections.abc import Iterator

from vqcore.check.findings import Finding
from vqcore.data.sizes import sizes
from vqcore.errors import listed
from vqcore.evaluate.usage import learns_codes
from vqcore.run.optim import peak_rate, rate_in_words
from vqcore.run.state import Run

STEPS_TO_MEET_ALL = 10
"""A codebook is too large for its batches when that many steps have fewer tokens than it has codes."""


def codebook(run: Run) -> Iterator[Finding]:
    """A codebook with more codes than a step, or than the whole training set, has tokens."""
    tokenizer, cfg = run.tokenizer, run.config
    if not learns_codes(tokenizer.quantizer):
        return
    size = sizes(cfg.data, tokenizer.spec)[-1]
    per_sample, codes = math.prod(tokenizer.grid(size)), tokenizer.codebook_size
    in_step = per_sample * run.total_batch
    where = f"model.quantizer ({cfg.model.quantizer.name})"
    if codes > per_sample * len(run.data):
        what = f"{codes:,} codes, but the training set has {per_sample * len(run.data):,} tokens in all"
        yield Finding("warning", where, what, "Take a smaller codebook or more data.")
    elif codes > in_step:
        grave = codes > STEPS_TO_MEET_ALL * in_step
        steps = math.ceil(codes / in_step)
        what = f"{codes:,} codes and {in_step:,} tokens in a step: {steps} steps are needed to meet all codes"
        remedy = f"Raise data.batch_size or optim.accumulate until a step has about {codes:,} tokens."
        yield Finding("warning" if grave else "note", where, what, remedy if grave else "")


def parameters(run: Run) -> Iterator[Finding]:
    """Numbers of parameters by part, and what is frozen."""
    shown, parts = [], run.tokenizer.facts().parts
    for name, part in parts.items():
        more = [f"and {_count(part.buffers)} in buffers"] if part.buffers > part.parameters else []
        more += ["frozen"] if part.parameters and not part.trained else []
        more += [f"and {_count(part.borrowed)} borrowed"] if part.borrowed else []
        shown.append(f"{name} {_count(part.parameters)}{f' ({listed(more)})' if more else ''}")
    if not any(part.trained for part in parts.values()):
        yield Finding(
            "error", "model", "no parameter is trained", "Check model.freeze_enc and the model's settings."
        )
    total = sum(part.parameters for part in parts.values())
    yield Finding("note", "model", f"{_count(total)} parameters: {', '.join(shown)}")


def tokens(run: Run) -> Iterator[Finding]:
    """Tokens a sample, bits a token and a position, passes over the data."""
    facts = run.tokenizer.facts()
    books = f" in {facts.num_codebooks} codebooks" if facts.num_codebooks > 1 else ""
    text = (
        f"{' x '.join(map(str, facts.size))} becomes {' x '.join(map(str, facts.grid))} = {facts.tokens} tokens of "
        f"{facts.bits_per_token:.4g} bits ({facts.codebook_size:,} codes{books}), {facts.bits_per_position:.4g} bits "
        f"a {'pixel' if facts.spec.rank == 2 else 'position'}"
    )
    yield Finding("note", "model.quantizer", text)
    passes = run.steps * run.total_batch / len(run.data)
    yield Finding("note", "run.steps", f"{run.steps:,} steps are {passes:.3g} passes over the training set")


def rates(run: Run) -> Iterator[Finding]:
    """Every player's peak learning rate in numbers; a warm-up that takes most of the run or all of it."""
    batch = run.total_batch
    for name in run.player_names:
        cfg = run.player(name).cfg
        where = f"optim.players.{name}" if name in run.config.optim.players else "optim"
        whose = "" if name == "model" else f" for {name}"
        yield Finding("note", where, f"{rate_in_words(cfg, batch)}{whose}")
        if 2 * cfg.warmup > run.steps:
            short = f"{where}.warmup={cfg.warmup} of run.steps={run.steps}"
            if cfg.warmup < run.steps:
                what = f"{short}: more than half of the run is warm-up"
            else:
                reached = peak_rate(cfg, batch) * run.steps / cfg.warmup
                what = f"{short}: the learning rate rises to the end of the run, to {reached:.3g}, and never falls"
            yield Finding("warning", where, what, f"E.g. {where}.warmup={run.steps // 20}.")


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
