"""The format `fourm/config`: a training YAML of 4M's three scripts, and flags, as a config of ours."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from vqcore import config
from vqcore.errors import ConfigError, did_you_mean, first_line, listed
from vqcore.protocols import ForeignConfig
from vqcore_fourm.arguments import LARGEST
from vqcore_fourm.domains import DOMAINS, Domain
from vqcore_fourm.options import OPTIONS, SCRIPTS, Option
from vqcore_fourm.recipes import RECIPES, as_family, wanted
from vqcore_fourm.tables import CONDITIONING, DENOISERS, MLP, PREDICTIONS, SCHEDULES, SHIFTED, VIT

LOSSES = {
    "mse": "mse",
    "l1": "l1",
    "smooth_l1": "smooth_l1",
    "cross_entropy": "cross_entropy",
    "cosine_1d": "cosine",
    "binary_cross_entropy": "bce",
}
"""4M's losses, and ours. 4M's `cosine` compares positions, and is refused."""

PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LONGEST = 60
"""So many letters of a value are shown."""
WISHES = {"int": "a whole number", "float": "a number", "numbers": "a list of numbers", "text": "a text"}


class Config:
    """Reads training configs of 4M. The script is seen from the options, or said by `script`.

    The published ones are families: `vqcore new config --like fourm/NAME FOLDER`.
    """

    families = tuple(RECIPES)

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of `fourm/config`."""

        script: Literal["vqvae", "divae", "vqcontrolnet"] | None = None
        """The script that the file is for. Null: seen from its options."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def recognises(self, path: Path) -> bool:
        """YAML files; whether one is 4M's is seen when it is read."""
        return path.suffix.lower() in (".yaml", ".yml") and path.is_file()

    def config(self, path: Path) -> Mapping[str, Any]:
        """The config of ours. Raises `ConfigError` for files that are no training config of 4M."""
        return self.explained(path, ()).tree

    def explained(self, path: Path, flags: Sequence[str]) -> ForeignConfig:
        """The config of ours with comments; flags replace what the file says, as in 4M."""
        found = _read(path)
        script = self.cfg.script or script_of({**found, **dict.fromkeys(_words(flags))})
        unknown = [name for name in found if name not in OPTIONS]
        given = {name: _value(OPTIONS[name], value, path) for name, value in found.items() if name in OPTIONS}
        given |= _flags(script, flags)
        made = converted(script, given, str(path))
        words = [f"{name} is no option of 4M, and left out.{did_you_mean(name, OPTIONS)}" for name in unknown]
        return ForeignConfig(made.tree, made.notes, (*made.remarks, *words))

    def like(self, name: str) -> ForeignConfig:
        """A published training config for files of other people. Raises `ConfigError` for an unknown name."""
        found = wanted(name)
        options = {**found.options, "data_path": "."}
        patch = options.get("patch_size", 16)
        step = 32 if options.get("decoder_type") == "unet_patched" else patch
        step = 1 if DOMAINS[options["domain"]].features else step
        return as_family(found, converted(found.recipe.script, options, f"fourm/{name}"), step)


def script_of(found: Mapping[str, Any]) -> str:
    """The script whose options these are."""
    for script in ("vqcontrolnet", "divae"):
        if any(OPTIONS[name].scripts == (script,) for name in found if name in OPTIONS):
            return script
    denoises = str(found.get("decoder_type", "")).startswith(("unet_", "uvit_"))
    return "divae" if denoises else "vqvae"


def converted(script: str, given: Mapping[str, Any], where: str) -> ForeignConfig:
    """The config of ours for options of 4M. Raises `ConfigError` that names `where` and the option."""
    defaults = {
        name: option.default_of(script) for name, option in OPTIONS.items() if script in option.scripts
    }
    return _Conversion(script, {**defaults, **given}, frozenset(given), where).made()


class _Conversion:
    """One conversion: the options, and the remarks and notes that come up."""

    def __init__(self, script: str, options: Mapping[str, Any], given: frozenset[str], where: str):
        self.script, self.options, self.given, self.where = script, options, given, where
        self.remarks: list[str] = []
        self.notes: dict[str, str] = {}
        name = options["domain"]
        if name not in DOMAINS:
            raise self.error(
                "domain", f"which has no tokenizer.{did_you_mean(name, DOMAINS)} 4M has: {listed(DOMAINS)}"
            )
        for size in ("patch_size", "resolution_step"):
            if options[size] < 1:
                raise self.error(size, "expected a whole number from 1 on")
        self.domain: Domain = DOMAINS[name]
        self.denoises = script != "vqvae"

    def error(self, option: str, why: str) -> ConfigError:
        return ConfigError(f"{self.where}: {option} is {_shown(self.options.get(option))}, {why}")

    def made(self) -> ForeignConfig:
        model = self.model()
        tree = {
            "data": self.data(),
            "model": model,
            "objective": self.diffusion() if self.denoises else self.reconstruction(),
            "run": self.run(),
            "optim": self.optim(),
            "ema": {"decay": self.options["model_ema_decay"] if self.options["model_ema"] else None},
            "eval": self.evaluation(),
        }
        if self.options["log_wandb"]:
            tree["hooks"] = {"wandb": self.wandb()}
        self.dropped()
        self.remarks.insert(
            0, f"{SCRIPTS[self.script]}; batch_size is for one process, base_lr for a total batch of 256."
        )
        return ForeignConfig(tree, self.notes, tuple(self.remarks))

    def positions(self, option: str, pixels: int) -> int:
        """Pixels, or of feature maps the positions."""
        if not self.domain.features:
            return pixels
        step = self.options["patch_size"]
        if pixels % step:
            raise self.error(option, f"no multiple of patch_size, which is {step}")
        return pixels // step

    def data(self) -> dict[str, Any]:
        o = self.options
        modality = dict(self.domain.modality)
        if self.domain.cropped:
            modality["min_crop_scale"] = o["min_crop_scale"]
        if o["domain"] == "rgb" and o["imagenet_default_mean_and_std"]:
            modality |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        if self.domain.features and "teacher" in modality:
            modality["stride"] = o["patch_size"]
        self.remarks += [self.domain.remark] if self.domain.remark else []
        shards = o["use_wds"]
        made: dict[str, Any] = {"name": "tar" if shards else "folder"}
        for ours, theirs in (("path", "data_path"), ("eval_path", "eval_data_path")):
            path = o[theirs]
            if path is None and ours == "path":
                raise ConfigError(
                    f"{self.where}: data_path is not given. Give it after --: -- --data_path FOLDER"
                )
            if path is not None:
                made[ours] = self.place(str(path), self.domain.folder, shards and ours == "path")
        if shards:
            self.notes["data.path"] = "Please check: brackets in 4M name modalities; here is one."
        made["modality"] = modality
        if o["mask_value"] is not None:
            made["extra"] = {"mask": {"name": "mask", "mask_value": o["mask_value"], "threshold": 254}}
            made["extra_path"] = {"mask": self.place(str(o["data_path"]), "mask_valid", shards)}
            if o["eval_data_path"] is not None:
                made["eval_extra_path"] = {"mask": self.place(str(o["eval_data_path"]), "mask_valid", False)}
            self.remarks.append("mask_value: the mask weighs losses, and is no channel of the tokenizer.")
        made |= self.sizes() | {"batch_size": o["batch_size"], "workers": o["num_workers"]}
        return made

    def place(self, root: str, folder: str, shards: bool) -> str:
        """Where samples of a modality lie: 4M's folders are `root/<modality>/<class>/<id>.<ext>`."""
        return root.replace("[", "{").replace("]", "}") if shards else f"{root.rstrip('/')}/{folder}"

    def sizes(self) -> dict[str, Any]:
        o = self.options
        if self.domain.vector:
            return {}
        if self.domain.masks:
            return {"input_size": o["mask_size"]}
        low, high = (self.positions(name, o[name]) for name in ("input_size_min", "input_size_max"))
        if low == high:
            return {"input_size": high}
        step = self.positions("resolution_step", o["resolution_step"])
        if (high - low) % step:
            self.remarks.append(
                "resolution_step does not divide the range of sizes; 4M then goes beyond input_size_max."
            )
        return {"input_size_min": low, "input_size_max": high, "resolution_step": step}

    def network(self, option: str, kind: str) -> dict[str, Any]:
        o, name = self.options, str(self.options[option])
        if name in VIT and name.endswith(kind[:3]):
            made: dict[str, Any] = {"name": f"vit/{kind}", **VIT[name]}
            made |= {"patch_proj": False} if self.domain.features else {"patch_size": o["patch_size"]}
            made["post_mlp"] = o["post_mlp"]
            key = f"input_size_{kind[:3]}"
            if (pixels := o.get(key)) is not None:
                made[key] = self.positions(key, pixels)
            return made
        found = MLP.fullmatch(name)
        if found is None:
            known = [
                each
                for each in (*VIT, *(DENOISERS if self.denoises else ()))
                if kind[:3] in each or each in DENOISERS
            ]
            raise self.error(
                option,
                f"which 4M does not have.{did_you_mean(name, known)} It has: {listed(known)}, and MLPs",
            )
        shape, depth, width, expansion = found.groups()
        made = {"name": f"vit/mlp-{kind}", "depth": int(depth), "width": int(width)}
        if shape == "MLP":
            return made | {"kind": "plain", "activation": "none"}
        return made | ({"expansion": int(expansion)} if expansion else {})

    def model(self) -> dict[str, Any]:
        o = self.options
        made: dict[str, Any] = {
            "encoder": self.network("encoder_type", "encoder"),
            "quantizer": self.quantizer(),
            "decoder": self.denoiser() if self.denoises else self.network("decoder_type", "decoder"),
        }
        if not self.denoises and o["out_conv"]:
            made["decoder"]["out_conv"] = "convnext"
        if self.domain.labels:
            made["embed_dim"] = 64
        start = "full_ckpt" if o["full_ckpt"] is not None else "encoder_ckpt"
        if o[start] is not None:
            files = o["freeze_enc"] and o["domain"] != "rgb"
            settings = f"[files=true,domain={o['domain']}]" if files else ""
            made[start] = f"fourm/checkpoint{settings}:{o[start]}"
            self.notes[f"model.{start}"] = (
                "A .pth of 4M needs --allow-pickle. A run or tokenizer of vqcore is named without 'fourm/checkpoint:'."
            )
        if o["freeze_enc"]:
            if start == "encoder_ckpt":
                raise self.error("freeze_enc", "but there is no full_ckpt, whose tokens would stay")
            made["freeze_enc"] = True
        return made

    def denoiser(self) -> dict[str, Any]:
        o = self.options
        if self.script == "vqcontrolnet":
            if "dec_transformer_dropout" in self.given:
                self.remarks.append("dec_transformer_dropout does nothing in a ControlNet, in 4M neither.")
            steered: dict[str, Any] = {"name": "controlnet/sd"}
            steered |= {key: o[key] for key in ("sd_path", "input_size_sd", "pretrained_cn", "cond_scale")}
            if not steered["sd_path"].startswith((".", "/", "~", "hf:")):
                steered["sd_path"] = f"hf://{steered['sd_path']}"
            return steered
        name = o["decoder_type"]
        if name not in DENOISERS:
            raise self.error(
                "decoder_type",
                f"which 4M does not have.{did_you_mean(str(name), DENOISERS)} It has: {listed(DENOISERS)}",
            )
        made: dict[str, Any] = dict(DENOISERS[name])
        if "widths" in made:
            made["widths"] = list(made["widths"])
        if made["name"] == "unet/unet":
            return made
        if o["conditioning"] not in CONDITIONING:
            raise self.error("conditioning", f"expected one of {listed(CONDITIONING)}")
        made["dropout"] = o["dec_transformer_dropout"]
        return made | (
            {} if o["conditioning"] == "concat" else {"conditioning": CONDITIONING[o["conditioning"]]}
        )

    def quantizer(self) -> dict[str, Any]:
        o = self.options
        made = {"codebook_size": o["codebook_size"], "latent_dim": o["latent_dim"]}
        several = {"num_codebooks": o["num_codebooks"]} if o.get("num_codebooks", 1) > 1 else {}
        if o["quantizer_type"] == "memcodes":
            return {"name": "quant/memcodes", **made, **several}
        if o["quantizer_type"] != "lucid":
            raise self.error("quantizer_type", "expected lucid or memcodes")
        made = {"name": "quant/vq", **made, "normalize": o["norm_codes"], "decay": o["quantizer_ema_decay"]}
        made |= {"coef_ema_dead_code": o["coef_ema_dead_code"], "dead_code": o["code_replacement_policy"]}
        if several:
            made |= several | {"code_dim": o["latent_dim"]}
        made["commitment_weight"] = o["commitment_weight"]
        return made | {name: True for name in ("norm_latents", "kmeans_init") if o[name]}

    def loss(self) -> str:
        if self.options["loss_fn"] not in LOSSES:
            raise self.error("loss_fn", f"expected one of {listed(LOSSES)}")
        return LOSSES[self.options["loss_fn"]]

    def weights(self) -> dict[str, float]:
        weight = self.options["codebook_weight"]
        learned = self.options["quantizer_type"] == "lucid"
        return {"vq/commit": weight} if weight != 1 and learned else {}

    def reconstruction(self) -> dict[str, Any]:
        o, weights = self.options, self.weights()
        made: dict[str, Any] = {"name": "reconstruction", "loss": self.loss()}
        if made["loss"] == "bce":
            self.notes["objective.loss"] = (
                "Of the masks' logits. 4M's is a softmax of probabilities, never 0."
            )
        kind = o["percept_loss_type"]
        if kind and o["percept_loss_weight"]:
            judge = {"name": "percept/lpips"}
            if kind != "lpips":
                distance = {"cos": "cosine", "mae": "l1"}.get(
                    o["percept_loss_distance"], o["percept_loss_distance"]
                )
                judge = {"name": "percept/timm", "model": kind, "blocks": o["percept_loss_blocks"].split("-")}
                judge |= {"distance": distance}
                self.notes["objective.percept"] = (
                    "4M divides this loss by the batch a second time, as divide_by_batch=true does. Its judge ran in "
                    f"{o['dtype_percept'] or o['dtype']}; here in fp32, or judge.dtype=bf16."
                )
            made["percept"] = {"judge": judge}
            weights["percept/judge"] = o["percept_loss_weight"]
        return made | ({"weights": weights} if weights else {})

    def diffusion(self) -> dict[str, Any]:
        o = self.options
        made: dict[str, Any] = {"name": "diffusion", "loss": self.loss(), "scheduler": self.scheduler()}
        if o.get("prediction_type", "").endswith("epsilon_loss"):
            made["loss_on"] = "epsilon"
        share = o["cls_free_guidance_dropout"]
        if share:
            made["cls_free_guidance_dropout"] = share
            if o["masked_cfg"]:
                made |= self.hidden()
        weights = self.weights()
        return made | ({"weights": weights} if weights else {})

    def hidden(self) -> dict[str, Any]:
        """4M's bounds are those of the tokens that stay visible."""
        o = self.options
        tokens = (o["input_size_max"] // o["patch_size"]) ** 2
        low, high = o["masked_cfg_low"], o["masked_cfg_high"]
        made: dict[str, Any] = {"masked_cfg": True}
        made |= {"masked_cfg_low": max(0, tokens - high)} if high is not None and high < tokens else {}
        if low or high is not None:
            self.notes["objective.masked_cfg"] = (
                "4M's bounds count the tokens that stay visible; these count hidden ones."
            )
        return made | ({"masked_cfg_high": max(0, tokens - low)} if low else {})

    def scheduler(self) -> dict[str, Any]:
        o = self.options
        if self.script == "vqcontrolnet":
            made = {
                "name": "unet/pndm",
                "schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
            }
            return made | {
                "prediction": "epsilon",
                "zero_terminal_snr": False,
                "steps_offset": 1,
                "spacing": "leading",
                "final_alpha_one": False,
            }
        if o["prediction_type"] not in PREDICTIONS:
            raise self.error("prediction_type", f"expected one of {listed(PREDICTIONS)}")
        schedule, _, shift = str(o["beta_schedule"]).partition(":")
        if schedule not in (*SCHEDULES, SHIFTED):
            raise self.error("beta_schedule", f"expected one of {listed((*SCHEDULES, SHIFTED + ':NUMBER'))}")
        made = {"name": "unet/ddpm", "schedule": schedule}
        made |= {"shift": _number("beta_schedule", shift, self.where)} if shift else {}
        made["prediction"] = PREDICTIONS[o["prediction_type"]]
        made |= {"num_steps": o["num_train_timesteps"]} if o["num_train_timesteps"] != 1000 else {}
        made |= {} if o["zero_terminal_snr"] or schedule == SHIFTED else {"zero_terminal_snr": False}
        if o["thresholding"] and self.domain.bounded:
            made["clip"] = 1.0
        elif o["thresholding"]:
            self.notes["objective.scheduler"] = "4M clips samples to [-1, 1], beyond which these data reach."
        return made

    def run(self) -> dict[str, Any]:
        o = self.options
        precision = PRECISIONS.get(o["dtype"], o["dtype"])
        if precision not in PRECISIONS.values():
            raise self.error("dtype", f"expected one of {listed((*PRECISIONS, *PRECISIONS.values()))}")
        made: dict[str, Any] = {"epochs": o["epochs"], "precision": precision}
        if o["output_dir"] and "auto" not in o["output_dir"]:
            made["dir"] = o["output_dir"]
        return made | ({"seed": o["seed"]} if o["seed"] else {})

    def optim(self) -> dict[str, Any]:
        o = self.options
        names = {"adamw": "adamw", "adam": "adam", "sgd": "sgd", "nesterov": "sgd", "momentum": "sgd"}
        if o["opt"] not in names:
            raise self.error("opt", f"expected one of {listed(names)}")
        made: dict[str, Any] = {"name": names[o["opt"]], "base_lr": o["blr"]}
        if made["name"] == "sgd":
            made["args"] = {"momentum": o["momentum"]} | (
                {"nesterov": True} if o["opt"] != "momentum" else {}
            )
        elif len(o["opt_betas"]) != 2:
            raise self.error("opt_betas", "expected two numbers")
        else:
            made["betas"] = list(o["opt_betas"])
            made |= {"eps": o["opt_eps"]} if o["opt_eps"] != 1e-8 else {}
        made["weight_decay"] = o["weight_decay"]
        made |= {"weight_decay_end": o["weight_decay_end"]} if o["weight_decay_end"] is not None else {}
        made |= {"min_lr": o["min_lr"]} if o["min_lr"] else {}
        if o["warmup_steps"] > 0:
            made["warmup"] = o["warmup_steps"]
        elif o["warmup_epochs"] > 0:
            made["warmup_epochs"] = o["warmup_epochs"]
        elif o["warmup_epochs"] < 0:
            self.remarks.append(
                "warmup_epochs is below 0 without warmup_steps: 4M stops there; here is no warm-up."
            )
        made["clip"] = o["clip_grad"]
        if o["skip_grad"] is not None and o["clip_grad"] is None:
            made["max_norm"] = o["skip_grad"]
        return made

    def evaluation(self) -> dict[str, Any]:
        o = self.options
        made: dict[str, Any] = {}
        if o["step_eval"]:
            made["every"] = o["eval_freq"]
        else:
            self.remarks.append(
                f"4M evaluates every {o['eval_freq']} epochs; eval.every counts steps: set it, or measure the end."
            )
        if not (self.domain.vector or self.domain.masks):
            made["sizes"] = self.measured()
        if o["num_eval_metrics_samples"] is not None:
            made["samples"] = o["num_eval_metrics_samples"]
        if o["batch_size_eval"] is not None:
            made["batch_size"] = o["batch_size_eval"]
        if self.denoises:
            made["sampling"] = self.sampling()
        return made

    def measured(self) -> list[int]:
        """The sizes of an evaluation, and those of training if there are several."""
        o, sizes = self.options, set()
        for text in str(o["input_size_eval"]).split("-"):
            size = _number("input_size_eval", text, self.where)
            if size % o["patch_size"]:
                self.remarks.append(
                    f"input_size_eval {size:g} is no multiple of patch_size {o['patch_size']}, and left out."
                )
            else:
                sizes.add(self.positions("input_size_eval", int(size)))
        if o["input_size_min"] != o["input_size_max"] or not sizes:
            sizes |= {self.positions(name, o[name]) for name in ("input_size_min", "input_size_max")}
        return sorted(sizes)

    def sampling(self) -> dict[str, Any]:
        o = self.options
        made: dict[str, Any] = {"steps": o["num_eval_timesteps"]}
        if self.script == "vqcontrolnet":
            made["guidance"] = o["guidance_scale"]
            if o["dynamic_guidance"]:
                made |= {"guidance": 4.0, "guidance_schedule": "cosine"}
            if not o["cls_free_guidance_dropout"]:
                self.notes["eval"] = (
                    "Guidance leaves out prompt and tokens, which cls_free_guidance_dropout trains."
                )
            return made
        local = {"DDIMScheduler": "unet/ddim", "DDPMScheduler": "unet/ddpm"}
        schedule = o["eval_noise_schedule"]
        if schedule in local:
            made["scheduler"] = local[schedule]
        elif schedule is not None:
            made["scheduler"] = f"unet/diffusers[sampler={schedule}]"
        return made

    def wandb(self) -> dict[str, Any]:
        o = self.options
        made: dict[str, Any] = {"name": "track/wandb"}
        made |= {ours: o[f"wandb_{ours}"] for ours in ("project", "entity") if o[f"wandb_{ours}"]}
        if o["wandb_run_name"] and o["wandb_run_name"] != "auto":
            made["run_name"] = o["wandb_run_name"]
        return made | ({"tags": o["wandb_tags"].split("--")} if o["wandb_tags"] else {})

    def dropped(self) -> None:
        """One remark for each reason why options of the file have no meaning here; defaults of 4M are no news."""
        reasons: dict[str, list[str]] = {}
        for name in sorted(self.given):
            option = OPTIONS[name]
            if self.script not in option.scripts:
                reasons.setdefault(f"{SCRIPTS[self.script]} does not have it", []).append(name)
            elif not option.ours and self.options[name] != option.default_of(self.script):
                reasons.setdefault(option.why, []).append(name)
        self.remarks += [f"left out: {', '.join(names)} ({why})." for why, names in reasons.items()]


# Files and flags


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: no YAML file that can be read ({first_line(error)})") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(
            f"{path}: no training config of 4M: expected a line 'option: value' for each option"
        )
    if not found.keys() & OPTIONS.keys():
        raise ConfigError(
            f"{path}: no training config of 4M: none of its options is there, such as encoder_type"
        )
    return found


def _value(option: Option, value: Any, path: Path) -> Any:
    """The value as 4M's parser makes it: texts become numbers where the option is one (`1e-4` is a text in YAML)."""
    if value is None:
        if option.kind != "flag" and option.ours and not option.may_be_null:
            raise ConfigError(f"{path}: {option.name} is null, expected {WISHES[option.kind]}")
        return None
    if option.kind == "text":
        return value if isinstance(value, str) else str(value)
    if option.kind == "flag":
        value = TRUTH.get(value.lower(), value) if isinstance(value, str) else value
        if type(value) is bool:
            return value
        raise ConfigError(f"{path}: {option.name} is {_shown(value)}, expected true or false")
    if option.kind == "numbers":
        if isinstance(value, list):
            return [_number(option.name, one, str(path)) for one in value]
        raise ConfigError(f"{path}: {option.name} is {_shown(value)}, expected a list of numbers")
    number = _number(option.name, value, str(path))
    if option.kind == "int" and not (number == int(number) and abs(number) <= LARGEST):
        raise ConfigError(
            f"{path}: {option.name} is {_shown(value)}, expected a whole number up to {LARGEST}"
        )
    return int(number) if option.kind == "int" else number


def _number(name: str, value: Any, where: str) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: {name} is {_shown(value)}, expected a number")
    return number


def _shown(value: Any) -> str:
    """A value for the text of an error, which stays one short line."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line, after --: {message}")


def _words(flags: Sequence[str]) -> list[str]:
    """The names of the options among flags."""
    return [word[2:].partition("=")[0].removeprefix("no_") for word in flags if word.startswith("--")]


def _flags(script: str, flags: Sequence[str]) -> dict[str, Any]:
    """Options of 4M's command line. `--config` is read over: the file is the one that is imported."""
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-c", "--config", dest="config of 4M")
    for option in OPTIONS.values():
        if script not in option.scripts:
            continue
        if option.kind == "flag" and not option.valued:
            parser.add_argument(f"--{option.name}", action="store_true")
            off = option.off or f"no_{option.name}"
            parser.add_argument(f"--{off}", action="store_false", dest=option.name)
        else:
            parser.add_argument(f"--{option.name}", nargs="+" if option.kind == "numbers" else None)
    found = vars(parser.parse_args(list(flags)))
    found.pop("config of 4M", None)
    if found.pop("epoch_eval", False):
        found["step_eval"] = False
    return {
        name: _value(OPTIONS[name], value, Path("command line, after --")) for name, value in found.items()
    }
