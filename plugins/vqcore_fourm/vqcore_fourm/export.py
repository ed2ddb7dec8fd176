"""From a tokenizer of ours to the arguments of 4M's classes: where each setting goes, and what 4M cannot hold."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from vqcore.errors import CheckpointError, listed
from vqcore.protocols import DataSpec, expand
from vqcore.schema import TokenizerConfig
from vqcore_fourm.arguments import known, token_count
from vqcore_fourm.tables import CONDITIONING, DENOISERS, PREDICTIONS, SHIFTED, THRESHOLD, VIT

KEPT = "vqcore.json"
"""Where a setting goes that decides no code and no prediction."""
DEFAULT = "must have its default"
"""What 4M does not have: the setting must have its default."""

_TRAINING = ("drop_path", "dropout", "attn_dropout", "learnable_positions", "attention", "checkpointing")
_MIDDLE = ("size", "mid_width", "mid_depth", "mid_heads")
_JUDGES = (
    *(
        "weights",
        "percept",
        "adversary",
        "align",
        "align_margins",
        "align_weight",
        "balance",
        "balance_decay",
    ),
    *("loss", "width"),
)


def _transformer(part: str, size: str) -> dict[str, str]:
    return {
        **dict.fromkeys(("size", "width", "depth", "num_heads"), f"{part}_type"),
        **dict.fromkeys(("mlp_ratio", "grid_convs"), DEFAULT),
        **dict.fromkeys(_TRAINING, KEPT),
        "patch_size": "patch_size_dec" if part == "dec" else "patch_size",
        "patch_proj": "patch_proj",
        "post_mlp": "post_mlp",
        size: f"image_size_{part}",
    }


def _mlp(part: str) -> dict[str, str]:
    return dict.fromkeys(("kind", "depth", "width", "expansion", "activation"), f"{part}_type")


def _denoiser(*names: str) -> dict[str, str]:
    return {
        **dict.fromkeys(("patch_size", "norm_groups", *names), "dec_type"),
        **dict.fromkeys(("resolution_cond", "missing_resolution"), DEFAULT),
        **dict.fromkeys(("dropout", "checkpointing"), KEPT),
    }


def _scheduler(*names: str) -> dict[str, str]:
    return {
        "name": "scheduler",
        "num_steps": "num_train_timesteps",
        **dict.fromkeys(("schedule", "shift"), "beta_schedule"),
        "prediction": "prediction_type",
        "zero_terminal_snr": "zero_terminal_snr",
        "clip": "clip_sample",
        **dict.fromkeys(("threshold", "threshold_max"), "thresholding"),
        **dict.fromkeys(("beta_start", "beta_end"), DEFAULT),
        # How the sampler walks decides no prediction.
        **dict.fromkeys(("as_4m", "spacing", "steps_offset", *names), KEPT),
    }


GOES: dict[str, dict[str, str]] = {
    "vit/encoder": _transformer("enc", "input_size_enc"),
    "vit/decoder": {
        **_transformer("dec", "input_size_dec"),
        "out_conv": "out_conv",
        **dict.fromkeys(("out_conv_channels", "out_conv_scale", "out_conv_depth"), DEFAULT),
    },
    "vit/mlp-encoder": _mlp("enc"),
    "vit/mlp-decoder": _mlp("dec"),
    "fourm/none": {},
    "quant/vq": {
        **{name: name for name in ("codebook_size", "latent_dim", "num_codebooks", "norm_latents")},
        **{name: name for name in ("kmeans_init", "commitment_weight", "coef_ema_dead_code")},
        "normalize": "norm_codes",
        "decay": "ema_decay",
        "dead_code": "code_replacement_policy",
        "threshold_ema_dead_code": "threshold_ema_dead_code",
        "code_dim": "latent_dim",
        "codebook": "norm_codes",
        "shared_codebook": DEFAULT,
        **dict.fromkeys(("freeze", "eps", "kmeans_iters", "chunk_mib", "gradient", "temperature"), KEPT),
        **dict.fromkeys(
            ("orthogonal_weight", "entropy_weight", "entropy_gamma", "entropy_temperature"), KEPT
        ),
    },
    "quant/memcodes": {
        **{name: name for name in ("codebook_size", "latent_dim", "num_codebooks")},
        "chunk_mib": KEPT,
    },
    "unet/unet": _denoiser("width", "mult", "depth", "attention", "heads"),
    "unet/uvit": {
        **_denoiser(
            *("size", "widths", "depth", "downsample_before_mid", "mid_width", "mid_depth", "mid_heads")
        ),
        **dict.fromkeys(("mid_grid", "mlp_ratio", "long_skips"), "dec_type"),
        **dict.fromkeys(("conditioning", "as_4m"), "conditioning"),
        **dict.fromkeys(("attention", "attn_dropout", "drop_path"), KEPT),
        "dropout": "dec_transformer_dropout",
    },
    "unet/ddpm": _scheduler("variance"),
    "unet/ddim": _scheduler("eta", "final_alpha_one", "clipped_epsilon"),
    "reconstruction": dict.fromkeys(_JUDGES, KEPT),
    "diffusion": {
        **dict.fromkeys(_JUDGES, KEPT),
        **dict.fromkeys(("loss_on", "min_snr", "times", "times_mean", "times_std", "times_uniform"), KEPT),
        "scheduler": "scheduler",
        **{name: name for name in ("cls_free_guidance_dropout", "masked_cfg")},
        # Hidden tokens here, visible ones there.
        "masked_cfg_low": "masked_cfg_high",
        "masked_cfg_high": "masked_cfg_low",
    },
}
"""Where each setting of each component that 4M has goes: an argument, or one of the two above.

The settings of a component that is no row are refused by its name. The modality is kept in `vqcore.json` as a whole.
"""

ROLES = {
    "encoder": ("vit/encoder", "vit/mlp-encoder"),
    "quantizer": ("quant/vq", "quant/memcodes"),
    "decoder": ("vit/decoder", "vit/mlp-decoder", "unet/unet", "unet/uvit", "fourm/none"),
}
"""The components that 4M has."""


def arguments_of(cfg: TokenizerConfig, spec: DataSpec) -> tuple[str, dict[str, Any]]:
    """4M's class and its arguments, as `arguments.check` gives them for the same tokenizer.

    Raises `CheckpointError` that names every setting which 4M cannot hold.
    """
    parts: dict[str, Any] = {role: getattr(cfg.model, role) for role in ROLES}
    wrong = [
        f"model.{role}.name={part.name}: it has {listed(ROLES[role])}"
        for role, part in parts.items()
        if part.name not in ROLES[role]
    ]
    if wrong:
        raise _refusal(wrong)
    kind = {"unet": "DiVAE", "fourm": "VQ"}.get(parts["decoder"].name.partition("/")[0], "VQVAE")
    made = {name: default for name, (default, _) in known(kind).items()}
    for key, find in (("model", _networks), ("model.quantizer", _codes), ("objective", _diffusion)):
        for name, value in find(cfg, spec, kind, made):
            if name:
                made[name] = value
            else:
                wrong.append(f"{key}{value}")
    components = [("model." + role, part) for role, part in parts.items()]
    if kind == "DiVAE" and cfg.objective.name == "diffusion":
        components.append(("objective.scheduler", _any(cfg.objective).scheduler))
    for where, part in components:
        wrong += [f"{where}.{line}" for line in _not_default(part)]
    if wrong:
        raise _refusal(sorted(set(wrong)))
    return kind, made


Found = Iterator[tuple[str, Any]]
"""Arguments with their values; without a name, what cannot be held: a key below that of the section, and why."""


def _networks(cfg: TokenizerConfig, spec: DataSpec, kind: str, made: Mapping[str, Any]) -> Found:
    encoder, decoder = _any(cfg.model.encoder), _any(cfg.model.decoder)
    has_vit = encoder.name == "vit/encoder" or decoder.name == "vit/decoder"
    if spec.rank != 2 and (has_vit or kind == "DiVAE"):
        yield "", f".encoder: samples have {spec.rank} axes, and those of 4M have two"
        return
    yield "n_channels", spec.channels
    if spec.labels is not None:
        yield "n_labels", spec.labels
        if cfg.model.embed_dim is None:
            yield "", ".embed_dim=null: it embeds classes, and none are one-hot"
        yield "n_channels", cfg.model.embed_dim
    yield from _type("encoder", encoder)
    if kind != "VQ":
        yield from _type("decoder", decoder)
    vits = [("encoder", encoder)] if encoder.name == "vit/encoder" else []
    vits += [("decoder", decoder)] if decoder.name == "vit/decoder" else []
    if vits:
        first = vits[0][1]
        for name in ("patch_proj", "post_mlp"):
            yield name, getattr(first, name)
            if getattr(first, name) != getattr(vits[-1][1], name):
                yield "", f".decoder.{name}={vits[-1][1].__dict__[name]}: encoder and decoder share it there"
        yield from _sizes(cfg, spec, vits)
    elif kind == "DiVAE":
        yield from _side("image_size", "size", cfg.size, 1)
    if decoder.name == "vit/decoder":
        yield "out_conv", decoder.out_conv == "convnext"
        if decoder.out_conv == "conv":
            yield "", ".decoder.out_conv=conv: it has convnext"


def _sizes(cfg: TokenizerConfig, spec: DataSpec, vits: list[tuple[str, Any]]) -> Found:
    """Sizes of patches and of grids of positions. Where positions are tokens, 4M counts pixels of patches of 16."""
    is_patched = vits[0][1].patch_proj
    patches = {}
    for role, net in vits:
        sides = expand(net.patch_size, 2) if is_patched else (16, 16)
        patches[role] = sides[0]
        if sides[0] != sides[1]:
            yield "", f".{role}.patch_size={list(sides)}: its configurations hold one number"
    first = next(iter(patches.values()))
    step = 1 if is_patched else first
    yield "patch_size", first
    if patches.get("decoder", first) != first:
        yield "patch_size_dec", patches["decoder"]
    built = {role: expand(getattr(net, f"input_size_{role[:3]}") or cfg.size, 2) for role, net in vits}
    # Of an MLP the nominal size counts positions of the data, which are no pixels.
    whole = max(cfg.size) if "encoder" in built else max(built["decoder"])
    yield "image_size", step * whole
    for role, sides in built.items():
        if sides != (whole, whole):
            part = role[:3]
            yield from _side(f"image_size_{part}", f".{role}.input_size_{part}", sides, step)


def _side(name: str, key: str, sides: tuple[int, ...], step: int) -> Found:
    if sides[0] != sides[1] and name != "image_size":
        yield "", f"{key}={list(sides)}: its configurations hold one number"
    yield name, step * max(sides)


def _type(role: str, net: Any) -> Found:
    """enc_type or dec_type."""
    name = f"{role[:3]}_type"
    if net.name.startswith("vit/mlp"):
        if (net.kind == "plain") != (net.activation == "none"):
            yield "", f".{role}.activation={net.activation}: with kind={net.kind} it has the other one"
        kind = "MLP" if net.kind == "plain" else "BottleneckMLP"
        more = f"-E_{net.expansion}" if net.expansion != 4 else ""
        yield name, f"{kind}/B_{net.depth}-Wi_{net.width}{more}"
    elif net.name.startswith("vit/"):
        named = {each: row for each, row in VIT.items() if each.endswith(role[:3])}
        found = [each for each, row in named.items() if type(net)(name=net.name, **row).shape == net.shape]
        if not found:
            width, depth, heads = net.shape
            text = f"width={width}, depth={depth}, num_heads={heads}: its sizes are {listed(named)}"
            yield "", f".{role} has {text}"
        yield name, next(iter(found), "")
    else:
        yield from _denoiser_type(net)


def _denoiser_type(net: Any) -> Found:
    goes = GOES[net.name]
    rows = {each: type(net)(**row) for each, row in DENOISERS.items() if row["name"] == net.name}
    differ = {
        each: [key for key, where in goes.items() if where == "dec_type" and _differs(key, net, row)]
        for each, row in rows.items()
    }
    nearest = min(differ, key=lambda each: len(differ[each]))
    if differ[nearest]:
        named = ", ".join(f"{key}={_as_built(key, net)}" for key in differ[nearest])
        yield "", f".decoder has {named}: its denoisers are {listed(rows)}"
    yield "dec_type", nearest
    if net.name == "unet/uvit":
        yield "conditioning", {ours: theirs for theirs, ours in CONDITIONING.items()}[net.conditioning]
        yield "dec_transformer_dropout", net.dropout
        if net.conditioning != "concat" and not net.as_4m:
            yield "", ".decoder.as_4m=False: its cross-attention has the errors that as_4m=true has"


def _differs(key: str, net: Any, row: Any) -> bool:
    return _as_built(key, net) != _as_built(key, row)


def _as_built(key: str, net: Any) -> Any:
    """A setting of a denoiser; those of a U-ViT's transformer as the preset and the default of 32 make them."""
    if net.name == "unet/uvit" and key in _MIDDLE:
        return (None, *net.mid)[_MIDDLE.index(key)]
    value = getattr(net, key)
    return 32 if key == "mid_grid" and value is None else value


def _codes(cfg: TokenizerConfig, spec: DataSpec, kind: str, made: Mapping[str, Any]) -> Found:
    quantizer = _any(cfg.model.quantizer)
    for name in ("codebook_size", "latent_dim", "num_codebooks"):
        yield name, getattr(quantizer, name)
    if quantizer.name == "quant/memcodes":
        yield "quant_type", "memcodes"
        return
    for ours, theirs in GOES["quant/vq"].items():
        if ours in ("norm_latents", "kmeans_init", "commitment_weight", "normalize", "decay"):
            yield theirs, getattr(quantizer, ours)
    width, several = quantizer.code_dim, quantizer.num_codebooks > 1
    if width != quantizer.latent_dim and (several or width is not None):
        yield "", f".code_dim={'null' if width is None else width}: its codes are as wide as latents"
    if quantizer.codebook == "learned" and not quantizer.normalize:
        yield "", ".codebook=learned: its Euclidean codes are means"
    if quantizer.dead_code is None:
        yield "threshold_ema_dead_code", 0
        return
    yield "code_replacement_policy", quantizer.dead_code
    threshold = quantizer.threshold_ema_dead_code
    if threshold is None:
        yield "coef_ema_dead_code", quantizer.coef_ema_dead_code
        if quantizer.coef_ema_dead_code is None:
            yield "threshold_ema_dead_code", 0
    else:
        yield "threshold_ema_dead_code", threshold


def _diffusion(cfg: TokenizerConfig, spec: DataSpec, kind: str, made: Mapping[str, Any]) -> Found:
    objective, wants = _any(cfg.objective), "diffusion" if kind == "DiVAE" else "reconstruction"
    if objective.name != wants:
        yield "", f".name={objective.name}: it has {wants}"
        return
    if kind != "DiVAE":
        return
    scheduler = objective.scheduler
    if scheduler.name not in ("unet/ddpm", "unet/ddim"):
        yield "", f".scheduler.name={scheduler.name}: it has unet/ddpm, unet/ddim"
        return
    yield "scheduler", scheduler.name.removeprefix("unet/")
    yield "num_train_timesteps", scheduler.num_steps
    shift = f":{scheduler.shift!r}" if scheduler.schedule == SHIFTED else ""
    yield "beta_schedule", scheduler.schedule + shift
    yield (
        "prediction_type",
        next(theirs for theirs, ours in PREDICTIONS.items() if ours == scheduler.prediction),
    )
    yield "zero_terminal_snr", scheduler.zero_terminal_snr
    bounds = (scheduler.threshold, scheduler.threshold_max)
    yield "thresholding", scheduler.threshold is not None
    yield "clip_sample", scheduler.clip is not None
    if scheduler.threshold is not None and bounds != (THRESHOLD, 1.0):
        yield "", f".scheduler.threshold={bounds[0]}, threshold_max={bounds[1]}: it has {THRESHOLD} and 1"
    if scheduler.clip not in (None, 1.0):
        yield "", f".scheduler.clip={scheduler.clip}: it has 1"
    yield "cls_free_guidance_dropout", objective.cls_free_guidance_dropout
    if objective.masked_cfg:
        tokens = token_count(made, cfg.size)
        most = tokens if objective.masked_cfg_high is None else min(tokens, objective.masked_cfg_high)
        least = min(tokens, objective.masked_cfg_low)
        yield "masked_cfg", True
        yield "masked_cfg_low", tokens - most
        yield "masked_cfg_high", tokens - least if least else None


def _not_default(part: Any) -> Iterator[str]:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if GOES.get(part.name, {}).get(field.name) == DEFAULT and value != field.default:
            yield f"{field.name}={value}: it has {field.default}"


def _any(value: Any) -> Any:
    return value


def _refusal(wrong: list[str]) -> CheckpointError:
    return CheckpointError(f"4M cannot hold this tokenizer: {'; '.join(wrong)}.")
