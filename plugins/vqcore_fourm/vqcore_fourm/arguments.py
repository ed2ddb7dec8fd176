"""The arguments of 4M's classes: their defaults, what they may be, and the config of ours that they amount to."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vqcore.compose.build import from_tree
from vqcore.errors import CheckpointError, ConfigError, did_you_mean, listed
from vqcore.schema import TokenizerConfig
from vqcore_fourm.base import Base
from vqcore_fourm.domains import DOMAINS, Domain
from vqcore_fourm.tables import (
    CONDITIONING,
    CONTROLNET,
    DENOISERS,
    FEATURES,
    MLP,
    OPTIONS,
    PREDICTIONS,
    SCHEDULES,
    SHIFTED,
    THRESHOLD,
    VIT,
)

Check = tuple[str, Callable[[Any], bool]]
LARGEST, FLOAT = 2**31 - 1, sys.float_info.max
KNOWN = f"give domain=NAME, one of {listed(DOMAINS, len(DOMAINS))}"


def _whole(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _sides(value: Any) -> bool:
    return _whole(value) or (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_whole, value)))


def _from_zero(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _schedule(value: Any) -> bool:
    name, colon, shift = value.partition(":") if isinstance(value, str) else ("", "", "")
    if name != SHIFTED or not colon:
        return value in SCHEDULES
    try:
        return 0 < float(shift) < math.inf
    except ValueError:
        return False


def _number(value: Any) -> bool:
    # A whole number of hundreds of digits is no float.
    return type(value) in (int, float) and 0 <= value <= FLOAT


def _or_null(check: Check) -> Check:
    return f"{check[0]}, or null", lambda value: value is None or check[1](value)


def _one_of(*names: str) -> Check:
    return f"one of {listed(names)}", lambda value: isinstance(value, str) and value in names


COUNT: Check = ("a whole number from 1 on", _whole)
SIZE: Check = ("one or two whole numbers from 1 on", _sides)
FLAG: Check = ("true or false", lambda value: type(value) is bool)
NUMBER: Check = ("a number from 0 on", _number)
SHARE: Check = ("a number from 0 to below 1", lambda value: _number(value) and value < 1)
TEXT: Check = ("a name", lambda value: isinstance(value, str))
FROM_ZERO: Check = ("a whole number from 0 on", _from_zero)
STEPS: Check = ("a whole number from 2 on", lambda value: _whole(value) and value > 1)
PART: Check = ("a share from 0 to 1", lambda value: _number(value) and value <= 1)
SCHEDULE: Check = (f"one of {listed(SCHEDULES)}, or {SHIFTED}: and a number above 0", _schedule)

ARGUMENTS: dict[str, tuple[Any, Check]] = {
    "image_size": (224, SIZE),
    "image_size_enc": (None, _or_null(SIZE)),
    "image_size_dec": (None, _or_null(SIZE)),
    "n_channels": (3, COUNT),
    "n_labels": (None, _or_null(COUNT)),
    "enc_type": ("vit_b_enc", TEXT),
    "dec_type": ("vit_b_dec", TEXT),
    "patch_proj": (True, FLAG),
    "post_mlp": (False, FLAG),
    "out_conv": (False, FLAG),
    "patch_size": (16, SIZE),
    "patch_size_dec": (None, _or_null(SIZE)),
    "quant_type": ("lucid", _one_of("lucid", "memcodes")),
    "codebook_size": (16384, COUNT),
    "num_codebooks": (1, COUNT),
    "latent_dim": (32, COUNT),
    "norm_codes": (True, FLAG),
    "norm_latents": (False, FLAG),
    "ema_decay": (0.99, SHARE),
    "threshold_ema_dead_code": (0.25, NUMBER),
    "coef_ema_dead_code": (None, _or_null(NUMBER)),
    "code_replacement_policy": ("batch_random", _one_of("batch_random", "linde_buzo_gray")),
    "commitment_weight": (1.0, NUMBER),
    "kmeans_init": (False, FLAG),
    "undo_std": (False, FLAG),
}
"""What decides a tokenizer: default and check of each argument. 4M's classes swallow all other arguments."""

HIDING: dict[str, tuple[Any, Check]] = {
    "cls_free_guidance_dropout": (0.0, PART),
    "masked_cfg": (False, FLAG),
    "masked_cfg_low": (0, FROM_ZERO),
    "masked_cfg_high": (None, _or_null(FROM_ZERO)),
}
"""How tokens are hidden in training."""

DIVAE: dict[str, tuple[Any, Check]] = {
    "dec_type": ("unet_patched", TEXT),
    "scheduler": ("ddpm", TEXT),
    "num_train_timesteps": (1000, STEPS),
    "beta_schedule": ("squaredcos_cap_v2", SCHEDULE),
    "prediction_type": ("v_prediction", _one_of(*PREDICTIONS)),
    "zero_terminal_snr": (True, FLAG),
    "clip_sample": (False, FLAG),
    "thresholding": (True, FLAG),
    "conditioning": ("concat", _one_of(*CONDITIONING)),
    "dec_transformer_dropout": (0.2, SHARE),
    **HIDING,
}
"""The same of a DiVAE alone."""

VQCONTROLNET: dict[str, tuple[Any, Check]] = {
    "sd_path": ("runwayml/stable-diffusion-v1-5", TEXT),
    "image_size_sd": (None, _or_null(SIZE)),
    "pretrained_cn": (False, FLAG),
    "adapter": (None, _or_null(TEXT)),
    **HIDING,
}
"""The same of a VQControlNet alone."""


def known(kind: str) -> dict[str, tuple[Any, Check]]:
    """Default and check of each argument of a class."""
    return ARGUMENTS | {"DiVAE": DIVAE, "VQControlNet": VQCONTROLNET}.get(kind, {})


@dataclass(frozen=True)
class Arguments:
    """Checked arguments of a class of 4M; `domain` is the modality by 4M's name, empty if nobody knows it."""

    values: Mapping[str, Any]
    kind: str = "VQVAE"
    domain: str = ""
    standardised: bool = False
    """Pictures were standardised with the mean and deviation of ImageNet, and the model does not undo it."""
    sees_size: bool = False
    """The denoiser is told the original size of a sample. No argument says so, but two tensors."""
    files: bool = False
    """The modality reads the files of the domain."""
    base: Base | None = None
    """What a VQControlNet needs to know of its Stable Diffusion."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def check(given: Mapping[str, Any], where: str, *, kind: str = "VQVAE", **facts: Any) -> Arguments:
    """Arguments of a class with their defaults; `facts` are the other fields of `Arguments`.

    Raises `CheckpointError` that names `where` for a value that cannot be.
    """
    values = {}
    for name, (default, (wish, fits)) in known(kind).items():
        value = given.get(name, default)
        if not fits(value):
            shown = repr(value)[:60] if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
            raise CheckpointError(f"{where}: {name} is {shown}, expected {wish}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return Arguments(values, kind, **facts)


def from_options(options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments that 4M makes from the options of a training script and from the shapes of the weights."""
    given = dict(options)
    given |= {new: options[old] for old, new in OPTIONS.items() if old in options}
    domain = str(options.get("domain", ""))
    if any(word in domain for word in FEATURES):
        given["patch_proj"] = False
    size = options.get("input_size") or options.get("input_size_max")
    if "sam" in domain and not any(word in domain for word in FEATURES):
        size = options.get("mask_size")
    if size is not None:
        given["image_size"] = size
    if len(embedding := shapes.get("cls_emb.weight", ())) == 2:
        given["n_labels"], given["n_channels"] = embedding
    else:
        given["n_labels"] = None
        into = shapes.get("encoder.linear_in.weight") or shapes.get("encoder.proj.weight") or ()
        if len(into) >= 2:
            given["n_channels"] = into[1]
    return given


def to_config(args: Arguments, *, size: int | tuple[int, ...] | None, where: str) -> TokenizerConfig:
    """The config of ours. `size` replaces the nominal size; the position embeddings keep theirs."""
    pixels = args["image_size"]
    nominal = _pair(size) if size else _data_size(args, pixels, args["patch_size"], where)
    domain = _domain(args, where)
    if "MLP" in args["enc_type"] and not size:
        nominal = (1,) if domain is not None and domain.vector else (1, 1)
    model: dict[str, Any] = {
        "encoder": _network(args, "enc", where),
        "quantizer": _quantizer(args),
        "decoder": _decoder(args, where),
    }
    if args["n_labels"]:
        model["embed_dim"] = args["n_channels"]
    tree = {
        "modality": _modality(args) if domain is None else _plain(domain.modality),
        "size": list(nominal),
        "model": model,
        "objective": _objective(args, nominal, where),
    }
    try:
        return from_tree(tree, schema=TokenizerConfig, file=f"{where}, as vqcore reads it")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _domain(args: Arguments, where: str) -> Domain | None:
    """The domain whose files are to be read, or None. Raises `CheckpointError` where nobody knows which it is."""
    if not args.files or args.base is not None:
        return None
    if not args.domain:
        raise CheckpointError(
            f"{where}: files=true reads the files of a domain, which this file does not say: {KNOWN}."
        )
    if args.domain not in DOMAINS:
        raise CheckpointError(
            f"{where}: files=true knows no domain {args.domain[:60]!r}.{did_you_mean(args.domain, DOMAINS)} {KNOWN}."
        )
    if args["undo_std"] or args.standardised:
        raise CheckpointError(
            f"{where}: files=true reads pictures in -1..1; this tokenizer wants standardised ones."
        )
    return DOMAINS[args.domain]


def _plain(tree: Any) -> Any:
    return {key: _plain(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _modality(args: Arguments) -> dict[str, Any]:
    if args["n_labels"]:
        return {"name": "array", "kind": "categorical", "labels": args["n_labels"]}
    is_rgb = args["undo_std"] or args.base or (args.domain.startswith("rgb") and not args.standardised)
    if is_rgb and args["n_channels"] == 3:
        return {"name": "rgb"}
    return {"name": "array", "channels": args["n_channels"]}


def _decoder(args: Arguments, where: str) -> dict[str, Any]:
    if args.kind == "VQ":
        return {"name": "fourm/none"}
    if args.base is not None:
        size = args["image_size_sd"] or args["image_size"]
        return {"name": CONTROLNET, "as_4m": True, "input_size_sd": _listed(size), **args.base.decoder}
    if args.kind != "DiVAE":
        return _network(args, "dec", where)
    name = args["dec_type"]
    if name not in DENOISERS:
        hint = did_you_mean(name, DENOISERS) or f" It has: {listed(DENOISERS)}."
        raise CheckpointError(f"{where}: dec_type is {name[:60]!r}, a denoiser that 4M does not have.{hint}")
    made = {key: _listed(value) for key, value in DENOISERS[name].items()}
    if args.sees_size:  # 4M tells it nothing where the user does not give a size
        made |= {"resolution_cond": True, "missing_resolution": None}
    if made["name"] == "unet/unet":
        return made
    made["dropout"] = args["dec_transformer_dropout"]
    if args["conditioning"] != "concat":
        made |= {"conditioning": CONDITIONING[args["conditioning"]], "as_4m": True}
    return made


def _objective(args: Arguments, nominal: tuple[int, ...], where: str) -> dict[str, Any]:
    if args.base is not None:
        return {"name": "diffusion", "scheduler": dict(args.base.scheduler), **_hidden(args, nominal, where)}
    return _diffusion(args, nominal, where) if args.kind == "DiVAE" else {"name": "reconstruction"}


def _diffusion(args: Arguments, nominal: tuple[int, ...], where: str) -> dict[str, Any]:
    """The objective of a DiVAE, and its scheduler, which samples as 4M does."""
    schedule, _, shift = args["beta_schedule"].partition(":")
    scheduler = {
        "name": "unet/ddpm" if args["scheduler"] == "ddpm" else "unet/ddim",
        "as_4m": True,
        "num_steps": args["num_train_timesteps"],
        "schedule": schedule,
        "prediction": PREDICTIONS[args["prediction_type"]],
        "zero_terminal_snr": args["zero_terminal_snr"],
        **({"shift": float(shift)} if shift else {}),
    }
    if args["thresholding"]:
        scheduler |= {"threshold": THRESHOLD, "threshold_max": 1.0}
    elif args["clip_sample"]:
        scheduler["clip"] = 1.0
    made = {"name": "diffusion", "scheduler": scheduler, **_hidden(args, nominal, where)}
    return made | ({"loss_on": "epsilon"} if args["prediction_type"].endswith("epsilon_loss") else {})


def _hidden(args: Arguments, nominal: tuple[int, ...], where: str) -> dict[str, Any]:
    """How many tokens are hidden in training. 4M's bounds are those of the tokens that stay visible."""
    share, low, high = (
        args[name] for name in ("cls_free_guidance_dropout", "masked_cfg_low", "masked_cfg_high")
    )
    if not share or not args["masked_cfg"]:
        return {"cls_free_guidance_dropout": share}
    if high is not None and low > high:
        raise CheckpointError(f"{where}: masked_cfg_low is {low}, above masked_cfg_high, which is {high}.")
    tokens = token_count(args, nominal)
    if low >= tokens:  # all tokens stay
        return {"cls_free_guidance_dropout": 0.0}
    made: dict[str, Any] = {"cls_free_guidance_dropout": share, "masked_cfg": True}
    if high is not None and high < tokens:
        made["masked_cfg_low"] = tokens - high
    return made | ({"masked_cfg_high": tokens - low} if low else {})


def token_count(args: Mapping[str, Any] | Arguments, nominal: tuple[int, ...]) -> int:
    """Tokens of a sample of the nominal size."""
    if not args["patch_proj"] or "MLP" in args["enc_type"]:
        return math.prod(nominal)
    return math.prod(side // step for side, step in zip(nominal, _pair(args["patch_size"])))


def _network(args: Arguments, part: str, where: str) -> dict[str, Any]:
    key, whole = f"{part}_type", "encoder" if part == "enc" else "decoder"
    name = args[key]
    if "vit" in name:
        if name not in VIT or not name.endswith(part):
            known = [each for each in VIT if each.endswith(part)]
            hint = did_you_mean(name, known) or f" It has: {listed(known)}."
            raise CheckpointError(f"{where}: {key} is {name[:60]!r}, which 4M does not have.{hint}")
        patch = (args["patch_size_dec"] if part == "dec" else None) or args["patch_size"]
        pixels = args[f"image_size_{part}"] or args["image_size"]
        made = {"name": f"vit/{whole}", **VIT[name], "post_mlp": args["post_mlp"]}
        made |= {"patch_size": _listed(patch)} if args["patch_proj"] else {"patch_proj": False}
        made[f"input_size_{part}"] = list(_data_size(args, pixels, patch, where))
        return made | ({"out_conv": "convnext"} if part == "dec" and args["out_conv"] else {})
    found = MLP.fullmatch(name)
    if found is None:
        raise CheckpointError(
            f"{where}: {key} is {name[:60]!r}, which 4M does not have. It has {listed(VIT)}, and MLPs such as "
            "BottleneckMLP/B_6-Wi_1024."
        )
    kind, depth, width, expansion = found.groups()
    made = {"name": f"vit/mlp-{whole}", "depth": int(depth), "width": int(width)}
    if kind == "MLP":
        return made | {"kind": "plain", "activation": "none"}
    return made | ({"expansion": int(expansion)} if expansion else {})


def _quantizer(args: Arguments) -> dict[str, Any]:
    shared = {name: args[name] for name in ("codebook_size", "latent_dim", "num_codebooks")}
    if args["quant_type"] == "memcodes":
        return {"name": "quant/memcodes", **shared}
    made = {"name": "quant/vq", **shared, "normalize": args["norm_codes"], "decay": args["ema_decay"]}
    made |= {"dead_code": args["code_replacement_policy"], "kmeans_init": args["kmeans_init"]}
    if args["coef_ema_dead_code"]:
        made["coef_ema_dead_code"] = args["coef_ema_dead_code"]
    else:
        made["threshold_ema_dead_code"] = args["threshold_ema_dead_code"]
    if args["num_codebooks"] > 1:  # each code is as wide as a latent, and linear layers lead in and out
        made["code_dim"] = args["latent_dim"]
    return made | {"norm_latents": args["norm_latents"], "commitment_weight": args["commitment_weight"]}


def _data_size(args: Arguments, pixels: Any, patch: Any, where: str) -> tuple[int, ...]:
    """The size of the data: pixels, or of feature maps the positions, of which 4M says only the pixels."""
    sides, steps = _pair(pixels), _pair(patch)
    uses_vit = "vit" in args["enc_type"] or (args.kind == "VQVAE" and "vit" in args["dec_type"])
    if not uses_vit:
        return sides
    if any(side % step for side, step in zip(sides, steps)):
        raise CheckpointError(
            f"{where}: image_size {list(sides)} is no multiple of patch_size {list(steps)}."
        )
    return sides if args["patch_proj"] else tuple(side // step for side, step in zip(sides, steps))


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _listed(size: Any) -> Any:
    return list(size) if isinstance(size, tuple) else size
