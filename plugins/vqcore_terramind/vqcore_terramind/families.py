"""How TerraMind's tokenizers were trained, as training configs for files of other people."""

from typing import Any

from vqcore.errors import ConfigError, did_you_mean, listed
from vqcore.protocols import ForeignConfig
from vqcore_terramind.tables import TRAININGS, VARIANTS, Training, Variant, variant_of

FAMILIES = tuple(TRAININGS)


def family(name: str) -> ForeignConfig:
    """The training config of `DEM`, `v1-DEM` or `terramind_v1_tokenizer_dem`. Raises `ConfigError` for other names."""
    known = {each.lower(): each for each in FAMILIES}
    try:
        row = variant_of(f"v1-{known[name.lower()]}" if name.lower() in known else name)
    except ValueError:
        raise ConfigError(
            f"{name} is no tokenizer of TerraMind.{did_you_mean(name, (*FAMILIES, *VARIANTS), 0.4)} "
            f"There are: {listed(FAMILIES)}"
        ) from None
    training = TRAININGS[row.name.rpartition("-")[2]]
    return ForeignConfig(_tree(row, training), _notes(row, training), _remarks(row, training))


def _tree(row: Variant, training: Training) -> dict[str, Any]:
    model = row.model()
    for part in ("encoder", "decoder"):  # positions are those of the nominal size, whatever it is
        model[part] = {key: value for key, value in model[part].items() if not key.startswith("input_size")}
    many = {"input_size_min": training.low, "input_size_max": row.size}
    sizes = many if training.low < row.size else {"input_size": row.size}
    loss = "cross_entropy" if row.labels else "mse"
    objective = row.objective()
    return {
        "data": {
            "modality": {**row.modality(), "hflip": 0.5, "min_crop_scale": 0.8},
            **sizes,
            "resolution_step": training.step,
            "batch_size": training.batch,
            "workers": 10,
        },
        "model": model,
        "objective": {"name": objective.pop("name"), "loss": loss, **objective},
        "run": {"epochs": training.epochs, "precision": "bf16" if row.labels else "fp16"},
        "optim": {
            "name": "adamw",
            "lr": training.lr,
            "betas": [0.9, 0.99],
            "weight_decay": 0.05,
            "warmup_epochs": 1,
            "clip": 1.0,
            "accumulate": training.accumulate,
        },
        "ema": {"decay": 0.99 if row.labels else 0.9999},
        "eval": {"every": 5000, "sizes": [row.size], **({} if row.labels else {"sampling": {"steps": 50}})},
    }


def _notes(row: Variant, training: Training) -> dict[str, str]:
    return {
        "optim.lr": f"For {training.total:,} samples a step: 8 processes x batch_size x accumulate.",
        "ema": "Published weights are the trained or the averaged ones; which of both is not said.",
        **({} if row.labels else {"eval.sampling": "The steps of TerraMind's evaluation."}),
    }


def _remarks(row: Variant, training: Training) -> tuple[str, ...]:
    old = row.name.startswith("v0.1")
    return (
        f"Architecture and quantizer of TerraMind's {row.full} (arXiv 2504.11171).",
        *(
            ("Nothing is published about the training of version 0.1; what follows is that of version 1.",)
            if old
            else ()
        ),
        f"Schedule as far as terratorch says it: {training.total:,} samples a step, {training.epochs} epochs of "
        f"{training.data}.",
        "Not published, and chosen here: how samples were spread over processes, when and on what was evaluated, the "
        "split, the training code itself.",
    )
