"""The options of 4M's three training scripts: kind, default, and what becomes of each.

A new option of 4M is a row of this table. The table in docs/from-4m.md is made from it (`table`).
"""

from dataclasses import dataclass
from typing import Any

SCRIPTS = {
    "vqvae": "run_training_vqvae.py",
    "divae": "run_training_divae.py",
    "vqcontrolnet": "run_training_vqcontrolnet.py",
}
"""4M's scripts by the names that the setting `script` has."""


@dataclass(frozen=True)
class Option:
    """One option. `scripts` are those that have it, `ours` the setting of ours; without one, `why` says the reason."""

    name: str
    kind: str
    default: Any
    ours: str = ""
    why: str = ""
    scripts: tuple[str, ...] = tuple(SCRIPTS)
    off: str = ""
    """A flag's opposite on the command line, where it is not `no_` and the name."""
    valued: bool = False
    """A flag that has a value on the command line: `--thresholding True`."""

    @property
    def may_be_null(self) -> bool:
        """Whether null stands for something: the default is null or empty, or 4M says so."""
        defaults = list(self.default.values()) if isinstance(self.default, dict) else [self.default]
        return self.name == "eval_noise_schedule" or any(each is None or each == "" for each in defaults)

    def default_of(self, script: str) -> Any:
        """The default, which some options have by script."""
        return self.default[script] if isinstance(self.default, dict) else self.default


V, D, C = (("vqvae",), ("divae",), ("vqcontrolnet",))
PROCESSES = "torchrun and its environment say it"
SHARDS = "the data source `tar` reads shards in an order of its own"
S3 = "the data source `tar` reads s3:// addresses"
UNREAD = "4M's scripts never read it"

_ROWS = (
    # Model
    Option("patch_size", "int", 16, "model.encoder.patch_size"),
    Option("patch_size_dec", "int", None, why="the script does not pass it on; the name of the decoder says it"),
    Option("input_size_min", "int", 224, "data.input_size_min"),
    Option("input_size_max", "int", 512, "data.input_size_max"),
    Option("resolution_step", "int", 32, "data.resolution_step"),
    Option("input_size_enc", "int", None, "model.encoder.input_size_enc"),
    Option("input_size_dec", "int", None, "model.decoder.input_size_dec", scripts=V),
    Option("mask_size", "int", 64, "data.input_size", scripts=V),
    Option("encoder_type", "text", "vit_s_enc", "model.encoder"),
    Option("decoder_type", "text", {"vqvae": "vit_b_dec", "divae": "unet_cat"}, "model.decoder", scripts=V + D),
    Option("post_mlp", "flag", True, "model.encoder.post_mlp"),
    Option("encoder_ckpt", "text", None, "model.encoder_ckpt"),
    Option("full_ckpt", "text", None, "model.full_ckpt"),
    Option("freeze_enc", "flag", False, "model.freeze_enc"),
    Option("out_conv", "flag", False, "model.decoder.out_conv", scripts=V),
    Option("dec_transformer_dropout", "float", 0.2, "model.decoder.dropout", scripts=D + C),
    # Losses
    Option("loss_fn", "text", "mse", "objective.loss"),
    Option("percept_loss_type", "text", None, "objective.percept", scripts=V),
    Option("percept_loss_blocks", "text", "blocks.2-blocks.5-blocks.8-blocks.11",
           "objective.percept.judge.blocks", scripts=V),
    Option("percept_loss_distance", "text", "cosine", "objective.percept.judge.distance", scripts=V),
    Option("percept_loss_weight", "float", 0.0, "objective.weights.percept/judge", scripts=V),
    Option("dtype_percept", "text", None, why="fp32, or objective.percept.judge.dtype: bf16", scripts=V),
    Option("codebook_weight", "float", 1.0, "objective.weights.vq/commit"),
    # Quantizer
    Option("quantizer_type", "text", "lucid", "model.quantizer"),
    Option("codebook_size", "int", 8192, "model.quantizer.codebook_size"),
    Option("num_codebooks", "int", 1, "model.quantizer.num_codebooks", scripts=V),
    Option("latent_dim", "int", 32, "model.quantizer.latent_dim"),
    Option("norm_codes", "flag", True, "model.quantizer.normalize"),
    Option("norm_latents", "flag", False, "model.quantizer.norm_latents"),
    Option("quantizer_ema_decay", "float", 0.8, "model.quantizer.decay"),
    Option("coef_ema_dead_code", "float", 4.0, "model.quantizer.coef_ema_dead_code"),
    Option("code_replacement_policy", "text", "batch_random", "model.quantizer.dead_code"),
    Option("commitment_weight", "float", 1.0, "model.quantizer.commitment_weight"),
    Option("kmeans_init", "flag", False, "model.quantizer.kmeans_init"),
    # Diffusion
    Option("num_train_timesteps", "int", 1000, "objective.scheduler.num_steps", scripts=D),
    Option("prediction_type", "text", "sample", "objective.scheduler.prediction", scripts=D),
    Option("beta_schedule", "text", "linear", "objective.scheduler.schedule", scripts=D),
    Option("zero_terminal_snr", "flag", True, "objective.scheduler.zero_terminal_snr", scripts=D),
    Option("thresholding", "flag", True, "objective.scheduler.clip", scripts=D, valued=True),
    Option("clip_sample", "flag", False, why="the script does not pass it on; thresholding decides", scripts=D + C),
    Option("conditioning", "text", "concat", "model.decoder.conditioning", scripts=D),
    Option("resolution_cond", "flag", False, why="no effect in 4M; here model.decoder.resolution_cond", scripts=D),
    Option("eval_res_cond", "int", 512, why="no effect in 4M; here model.decoder.missing_resolution", scripts=D),
    Option("cls_free_guidance_dropout", "float", 0.2, "objective.cls_free_guidance_dropout", scripts=D + C),
    Option("masked_cfg", "flag", True, "objective.masked_cfg", scripts=D + C),
    Option("masked_cfg_low", "int", 0, "objective.masked_cfg_high", scripts=D + C),
    Option("masked_cfg_high", "int", None, "objective.masked_cfg_low", scripts=D + C),
    Option("num_eval_timesteps", "int", 50, "eval.sampling.steps", scripts=D + C),
    Option("eval_noise_schedule", "text", "DDIMScheduler", "eval.sampling.scheduler", scripts=D),
    # ControlNet
    Option("input_size_sd", "int", 512, "model.decoder.input_size_sd", scripts=C),
    Option("max_input_size", "flag", False, why="controlnet/sd resizes the samples of a batch", scripts=C,
           valued=True),
    Option("guidance_scale", "float", 2.5, "eval.sampling.guidance", scripts=C),
    Option("cond_scale", "float", 0.8, "model.decoder.cond_scale", scripts=C),
    Option("dynamic_guidance", "flag", False, "eval.sampling.guidance_schedule", scripts=C),
    Option("sd_path", "text", "runwayml/stable-diffusion-v1-5", "model.decoder.sd_path", scripts=C),
    Option("pretrained_cn", "flag", False, "model.decoder.pretrained_cn", scripts=C),
    Option("adapter", "text", None, why="4M has no script that trains one; here model.decoder.adapter", scripts=C),
    Option("include_caption", "flag", True, why="captions are an extra field of data.extra, which you name", scripts=C),
    Option("use_xformer", "flag", False, why="taken where it is installed: model.decoder.attention", scripts=C),
    # Optimizer
    Option("batch_size", "int", 256, "data.batch_size"),
    Option("batch_size_eval", "int", None, "eval.batch_size"),
    Option("epochs", "int", 100, "run.epochs"),
    Option("save_ckpt_freq", "int", 10, why="4M counts epochs; run.save_every counts steps"),
    Option("opt", "text", "adamw", "optim.name"),
    Option("opt_eps", "float", 1e-8, "optim.eps"),
    Option("opt_betas", "numbers", [0.9, 0.95], "optim.betas"),
    Option("momentum", "float", 0.9, "optim.args.momentum"),
    Option("weight_decay", "float", 0.05, "optim.weight_decay"),
    Option("weight_decay_end", "float", None, "optim.weight_decay_end"),
    Option("blr", "float", 1e-4, "optim.base_lr"),
    Option("warmup_lr", "float", 1e-6, why=f"{UNREAD}: the warm-up begins at 0, as here"),
    Option("min_lr", "float", 0.0, "optim.min_lr"),
    Option("warmup_epochs", "int", {"vqvae": 5, "divae": 40, "vqcontrolnet": 40}, "optim.warmup_epochs"),
    Option("warmup_steps", "int", -1, "optim.warmup"),
    Option("clip_grad", "float", None, "optim.clip"),
    Option("skip_grad", "float", None, "optim.max_norm"),
    Option("dtype", "text", "float16", "run.precision"),
    Option("model_ema", "flag", True, "ema.decay"),
    Option("model_ema_decay", "float", 0.9999, "ema.decay"),
    Option("model_ema_force_cpu", "flag", False, why="the average lies where the weights lie"),
    Option("model_ema_update_freq", "int", 1, why="the average follows every step"),
    # Data
    Option("domain", "text", "rgb", "data.modality"),
    Option("hflip", "float", 0.5, why=f"{UNREAD}: half of the samples are mirrored, as here"),
    Option("min_crop_scale", "float", 0.8, "data.modality.min_crop_scale"),
    Option("mask_value", "float", None, "data.extra.mask.mask_value"),
    Option("data_path", "text", None, "data.path"),
    Option("eval_data_path", "text", None, "data.eval_path"),
    Option("imagenet_default_mean_and_std", "flag", False, "data.modality.mean"),
    Option("standardize_surface_normals", "flag", False, why="vision/normal has the range -1 to 1", scripts=V + D),
    Option("cache_datasets", "flag", False, why="listings are made anew, so that new files count"),
    Option("use_wds", "flag", False, "data.name"),
    Option("s3_endpoint", "text", "", why=S3),
    Option("s3_data_endpoint", "text", None, why=S3),
    Option("wds_n_repeats", "int", 1, why=SHARDS),
    Option("wds_shuffle_buffer_tar", "int", 1000, why=SHARDS),
    Option("wds_shuffle_buffer_repeat", "int", 1000, why=SHARDS),
    Option("s3_multipart_chunksize_mb", "int", 512, why=S3),
    Option("s3_multipart_threshold_mb", "int", 512, why=S3),
    Option("dataset_size", "int", None, why="shards are counted when a run starts"),
    Option("num_workers", "int", 10, "data.workers"),
    Option("pin_mem", "flag", True, why="decided by the device"),
    # Evaluation
    Option("dist_eval", "flag", True, why="every process takes its share of the evaluation"),
    Option("step_eval", "flag", False, "eval.every"),
    Option("epoch_eval", "flag", False, why="4M reads it on its command line alone, as the opposite of step_eval"),
    Option("input_size_eval", "text", "256", "eval.sizes"),
    Option("num_eval_metrics_samples", "int", None, "eval.samples"),
    Option("eval_freq", "int", 1, "eval.every"),
    Option("eval_metrics_freq", "int", 1, why="losses and metrics are measured together: eval.every"),
    Option("eval_image_log_freq", "int", 5, why="pictures are made after steps 10, 20, 50, 100 and so on"),
    Option("num_logged_images", "int", 100, why="eval.pictures says how many are on a sheet"),
    Option("eval_only", "flag", False, why="vqcore eval RUN"),
    Option("no_inception", "flag", False, why="FID and LPIPS are measured if eval.metrics names them"),
    Option("log_codebook_usage", "flag", True, why="the use of codes is always measured", scripts=V + D,
           off="no_codebook_usage"),
    # The rest
    Option("output_dir", "text", "", "run.dir"),
    Option("device", "text", "cuda", why="a GPU is taken where there is one: run.device"),
    Option("seed", "int", 0, "run.seed"),
    Option("resume", "text", "", why="a run continues in its folder: vqcore train CONFIG again"),
    Option("auto_resume", "flag", True, why="a run always continues in its folder"),
    Option("start_epoch", "int", 0, why="a run knows its step"),
    Option("find_unused_params", "flag", False, why="parameters without a gradient are found"),
    Option("show_user_warnings", "flag", False, why="warnings are shown"),
    Option("log_wandb", "flag", False, "hooks.wandb"),
    Option("wandb_project", "text", None, "hooks.wandb.project"),
    Option("wandb_entity", "text", None, "hooks.wandb.entity"),
    Option("wandb_run_name", "text", None, "hooks.wandb.run_name"),
    Option("wandb_tags", "text", "", "hooks.wandb.tags"),
    Option("run_name", "text", "auto", why="run.dir names the run"),
    Option("world_size", "int", 1, why=PROCESSES),
    Option("local_rank", "int", -1, why=PROCESSES),
    Option("dist_on_itp", "flag", False, why=PROCESSES),
    Option("dist_url", "text", "env://", why=PROCESSES),
    Option("s3_path", "text", "", why=UNREAD),
    Option("s3_save_dir", "text", "", why="copy the run's folder when it ends"),
)  # fmt: skip

OPTIONS = {option.name: option for option in _ROWS}
"""Every option by name; among them patch_size_dec, clip_sample and epoch_eval, which stand in YAML files alone."""


def table() -> str:
    """The table of docs/from-4m.md."""
    rows = ["| option of 4M | scripts | here |", "| --- | --- | --- |"]
    for option in _ROWS:
        scripts = "all" if len(option.scripts) == len(SCRIPTS) else ", ".join(option.scripts)
        rows.append(
            f"| `{option.name}` | {scripts} | {f'`{option.ours}`' if option.ours else f'dropped: {option.why}'} |"
        )
    return "\n".join(rows)
