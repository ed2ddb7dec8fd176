"""The recipes of diffusion and flow have the published settings, are as large as they say, and continue each other."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import tokenizer_of

from vqcore.compose.layers import load
from vqcore.schema import RunConfig

for plugin in ("vqcore_unet", "vqcore_vit", "vqcore_quant", "vqcore_vision"):
    pytest.importorskip(plugin)
CFGS = Path(__file__).resolve().parent.parent / "cfgs"
PUBLISHED = {
    "rgb/base": (16384, "mse", 1.0, "linear", "sample", 50, 64, 1e-4),
    "rgb/uvit-frozen_base": (1024, "mse", 1.0, "shifted_cosine", "v", 50, 64, 1e-4),
    "depth/base": (8192, "smooth_l1", None, "linear", "sample", 20, 64, 1e-4),
    "normal/base": (8192, "mse", 1.0, "linear", "sample", 20, 64, 1e-4),
    "edge/canny_base": (8192, "smooth_l1", 1.0, "linear", "sample", 50, 64, 5e-5),
}
"""Codebook size, loss, clipping, noise, prediction, epochs, batch size per process and learning rate of 4M's recipes;
depth is not clipped, which in 4M it is."""
SEVERAL = {
    "rgb/base": (448, 32, 16, 5, 5e-5, 0, 1),
    "rgb/uvit-frozen_base": (448, 16, 8, 5, 5e-5, 0, 1),
    "depth/base": (448, 32, 16, 1, 1e-4, 5000, None),
    "normal/base": (448, 32, 16, 1, 5e-5, 5000, None),
    "edge/canny_base": (512, 32, 64, 1, 5e-5, 5000, None),
}
"""Largest size, its step, batch size, epochs, learning rate, and warm-up in steps and epochs."""
FROZEN = {
    "divae/rgb/uvit-frozen_base": "vqvae/rgb/vitb_1k_clip-b16_multires",
    "flow/rgb/frozen": "vqvae/rgb/base",
    "vqcontrolnet/rgb/base": "vqvae/rgb/vitb_1k_clip-b16_base",
    "vqcontrolnet/rgb/multires": "vqvae/rgb/vitb_1k_clip-b16_multires",
}
HEADS = [f"divae/{name}" for name in PUBLISHED] + ["flow/rgb/base", "flow/rgb/frozen"]


def recipe(name: str) -> RunConfig:
    return load(str(CFGS / f"{name}.yaml"), [], schema=RunConfig).config


def shapes(name: str, **more: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a recipe's tensors, without making them; `more` as in `Tokenizer`."""
    with torch.device("meta"):
        made = tokenizer_of(recipe(name), **more)
        return {key: tuple(value.shape) for key, value in made.state_dict().items()}


def test_every_recipe_is_in_the_tables():
    found = {
        path.relative_to(CFGS / "divae").with_suffix("").as_posix() for path in CFGS.glob("divae/*/*.yaml")
    }
    assert found == {one for name in PUBLISHED for one in (name, name.replace("base", "multires"))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_base_recipes_have_the_published_settings(name):
    config = recipe(f"divae/{name}")
    quantizer, objective, optim = config.model.quantizer, config.objective, config.optim
    noise = objective.scheduler
    assert (
        quantizer.codebook_size,
        objective.loss,
        noise.clip,
        noise.schedule,
        noise.prediction,
        config.run.epochs,
        config.data.batch_size,
        optim.base_lr,
    ) == PUBLISHED[name]
    assert (noise.num_steps, noise.zero_terminal_snr, objective.cls_free_guidance_dropout) == (1000, True, 0)
    assert (objective.times, objective.min_snr, noise.spacing) == ("uniform", None, "trailing")
    assert (quantizer.latent_dim, quantizer.normalize, quantizer.decay) == (32, True, 0.99)
    assert (quantizer.commitment_weight, quantizer.coef_ema_dead_code) == (1.0, 32)
    encoder = config.model.encoder
    assert (encoder.size, encoder.patch_size, encoder.post_mlp) == ("b", 16, True)
    assert (optim.betas, optim.weight_decay, optim.clip, optim.warmup_epochs) == ((0.9, 0.99), 0.05, 1.0, 5)
    assert (config.run.precision, config.ema.decay) == ("fp16", 0.9999)
    assert (config.data.input_size, config.data.modality.min_crop_scale) == (224, 0.8)
    assert config.eval.sampling == {"scheduler": "unet/ddim", "steps": 50}


def test_the_u_vit_is_4ms():
    config = recipe("divae/rgb/uvit-frozen_base")
    decoder = config.model.decoder
    assert (decoder.size, decoder.conditioning, decoder.dropout) == ("b", "concat", 0.2)
    assert (config.objective.scheduler.shift, config.model.freeze_enc) == (0.5, True)


@pytest.mark.parametrize("name", [*(f"divae/{name}" for name in SEVERAL), "flow/rgb/base"])
def test_recipes_for_several_sizes_continue_their_base(name):
    base, config = recipe(name), recipe(name.replace("base", "multires"))
    data, optim = config.data, config.optim
    found = (data.input_size_max, data.resolution_step, data.batch_size, config.run.epochs)
    wanted = SEVERAL[name.partition("/")[2]]
    assert (*found, optim.base_lr, optim.warmup, optim.warmup_epochs) == wanted
    assert (data.input_size, data.input_size_min) == (None, 224)
    assert config.model.full_ckpt == base.run.dir != config.run.dir
    assert data.modality == base.data.modality and config.objective == base.objective
    assert config.model.quantizer == base.model.quantizer and config.model.decoder == base.model.decoder
    assert config.model.encoder.input_size_enc == 224 == config.eval.sizes[0]


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.slow
def test_frozen_encoders_are_those_of_the_run_that_they_come_from(name):
    config, origin = recipe(name), recipe(FROZEN[name])
    assert config.model.full_ckpt == origin.run.dir and config.model.freeze_enc
    assert shapes(name, encoder_only=True) == shapes(FROZEN[name], encoder_only=True)
    assert all((one.model.encoder.input_size_enc or one.data.input_size) == 224 for one in (config, origin))
    encoder = replace(config.model.encoder, input_size_enc=origin.model.encoder.input_size_enc)
    assert (encoder, config.model.quantizer) == (origin.model.encoder, origin.model.quantizer)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.slow
def test_the_heads_of_recipes_count_their_parameters(name):
    text = (CFGS / f"{name}.yaml").read_text()
    found = shapes(name)
    numbers = {key: torch.Size(shape).numel() / 1e6 for key, shape in found.items()}
    learns = sum(count for key, count in numbers.items() if key.startswith("decoder."))
    wanted = re.search(r"^# (?:(\d+) M of )?(\d+) M parameters(?:, of which (\d+) M learn)?", text, re.M)
    assert wanted is not None
    assert abs(sum(numbers.values()) - int(wanted[2])) < 1
    for said in (wanted[1], wanted[3]):
        assert said is None or abs(learns - int(said)) < 1


def test_the_flow_is_what_the_field_does():
    config = recipe("flow/rgb/base")
    objective, sampling = config.objective, config.eval.sampling
    noise = objective.scheduler
    assert (noise.prediction, noise.power, noise.solver, objective.times) == ("velocity", 4, "euler", "mixed")
    assert (objective.times_uniform, objective.cls_free_guidance_dropout) == (0.1, 0.1)
    assert objective.weights == {"percept/lpips": 0.1} and objective.loss_on == "prediction"
    assert (sampling["guidance"], sampling["guidance_from"], sampling["guidance_to"]) == (1.5, 0.15, 0.5)
