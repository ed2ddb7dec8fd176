"""The laws of `controlnet/sd` and `controlnet/adapter`, what is refused, and a training by the command line."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from hubserver import serving
from safetensors.torch import load_file
from toys import forget_attention
from vqcore_controlnet.adapter import Adapter, Latents
from vqcore_controlnet.base import load
from vqcore_controlnet.sd import StableDiffusion
from vqcore_unet.schedulers import DDPM

from vqcore.borrowed import Lender
from vqcore.cli import main
from vqcore.compose.build import from_tree
from vqcore.errors import CheckpointError, ConfigError
from vqcore.protocols import DataSpec
from vqcore.schema import TokenizerConfig
from vqcore.testing import checks
from vqcore.testing.basics import noise
from vqcore.testing.networks import check_borrowed
from vqcore.tokenizer import Tokenizer

SPEC = DataSpec(channels=3, size=(32, 32), range=(-1.0, 1.0))
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("sd"))


def made(base, seed=0, cls=StableDiffusion, **settings):
    torch.manual_seed(seed)
    cfg = cls.Config(sd_path=str(base), **{**(tiny.SETTINGS if cls is StableDiffusion else {}), **settings})
    return cls(cfg, dim=8, spec=SPEC)


def ready(base, seed=0, **settings):
    decoder = made(base, seed, **settings)
    Lender().lend({"decoder": decoder})
    return decoder


class TestLaws:
    def test_a_denoiser(self, base):
        one, other = (ready(base, seed, pretrained_cn=False) for seed in (0, 1))
        checks.check_denoiser(one, noise(3, 4, 4, 8), (3, 3, 32, 32), times=(1.0, 500.0), fresh=other)

    def test_a_borrower(self, base):
        check_borrowed(
            lambda: StableDiffusion(StableDiffusion.Config(**tiny.SETTINGS), dim=8, spec=SPEC),
            {"base": str(base)},
        )

    def test_an_adapter(self, base):
        decoder = made(base, cls=Adapter, widths=(16, 8), norm_groups=4)
        Lender().lend({"decoder": decoder})
        x = decoder(noise(2, 4, 4, 8), size=(32, 32))
        assert x.shape == (2, 3, 32, 32)
        x.sum().backward()
        assert decoder.last_layer.grad is not None and not any(
            p.grad is not None for p in decoder.vae.parameters()
        )
        with pytest.raises(ValueError, match="not a multiple of 16"):
            decoder(noise(2, 4, 4, 8), size=(32, 40))


class TestBase:
    def test_the_controlnet_starts_as_a_copy_and_adds_nothing(self, base):
        decoder = made(base)
        decoder.fetch()
        decoder.borrow({})
        for ours, theirs in zip(
            decoder.controlnet.down_blocks.parameters(), decoder.base.unet.down_blocks.parameters()
        ):
            assert torch.equal(ours, theirs) and ours.requires_grad
        cond = decoder.condition(noise(2, 4, 4, 8), size=(32, 32))
        x, t = noise(2, 4, 8, 8), torch.tensor([3.0, 700.0])
        with torch.no_grad():
            plain = decoder.base.unet(x, t, decoder.base.prompts(["", ""])).sample
            assert torch.allclose(decoder(x, t, cond), plain, atol=1e-5)

    def test_a_checkpoint_is_not_overwritten(self, base):
        decoder = ready(base, seed=1)
        assert not torch.equal(decoder.controlnet.conv_in.weight, decoder.base.unet.conv_in.weight)

    def test_other_sizes_of_tokens_are_decoded_at_the_size_of_the_base(self, base):
        decoder = ready(base)
        assert decoder.target_shape((32, 32)) == decoder.target_shape((64, 64)) == (4, 8, 8)
        x = noise(2, 3, 32, 32).clamp(-1, 1)
        y = decoder.to_target(x, generators_of(2))
        assert y.shape == (2, 4, 8, 8) and decoder.from_target(y, (32, 32)).shape == x.shape
        assert decoder.condition(noise(2, 6, 6, 8), size=(48, 48)).hint.shape == (2, 8, 8, 8)
        with pytest.raises(ValueError, match="other proportions"):
            decoder.target_shape((32, 64))

    def test_prompts_count_and_go_with_the_tokens(self, base):
        decoder, hidden = ready(base), torch.tensor([[True], [False]]).view(2, 1, 1).expand(2, 4, 4)
        cond = decoder.condition(
            noise(2, 4, 4, 8), size=(32, 32), mask=hidden, extras={"caption": ["red", "red"]}
        )
        assert torch.equal(cond.text, decoder.base.prompts(["", "red"]))

    def test_a_base_in_the_layout_of_2_1(self, tmp_path):
        """Linear projections, 64 channels a head, and v; here also with zero terminal SNR."""
        sizes = {"widths": (64, 128), "heads": None, "norm_groups": 32}
        folder = tiny.save(
            tmp_path / "sd", block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True,
            norm_num_groups=32,
        )  # fmt: skip
        file = folder / "scheduler/scheduler_config.json"
        levels = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        file.write_text(json.dumps({**json.loads(file.read_text()), **levels}))
        decoder = ready(folder, layout="2.1", **sizes)
        cond = decoder.condition(noise(2, 4, 4, 8), size=(32, 32))
        assert decoder(noise(2, 4, 8, 8), torch.tensor([3.0, 700.0]), cond).isfinite().all()
        right = {**tiny.LEVELS, "prediction": "v", "zero_terminal_snr": True}
        decoder.check_scheduler(DDPM(DDPM.Config(**right)))
        with pytest.raises(ValueError, match=r"prediction: v, zero_terminal_snr: true}"):
            decoder.check_scheduler(DDPM(DDPM.Config(**tiny.LEVELS)))
        with pytest.raises(
            CheckpointError, match=r"use_linear_projection=True, and model\.decoder\.layout says 1\.5"
        ):
            made(folder, **{**sizes, "heads": (1, 2)}).borrow({})

    @pytest.mark.slow
    def test_a_base_of_the_hub(self, base, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        base = shutil.copytree(base, tmp_path / "padded")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            file = base / "tokenizer" / name
            file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "a"}))
        files = {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}
        address = "hf://maker/sd@v1"
        with serving() as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.address)
            hub.repositories["maker/sd"] = {"main": {"README.md": b"empty"}, "v1": files}
            with pytest.raises(CheckpointError, match="--download"):
                Lender().lend({"decoder": made(address)})
            Lender(download=True).lend({"decoder": (fetched := made(address))})
            wrong = made("hf://maker/sd")
            with pytest.raises(CheckpointError, match=r"maker/sd.*model_index\.json"):
                Lender(download=True).lend({"decoder": wrong})
        Lender().lend({"decoder": (cached := made(address))})  # the hub is gone
        local = ready(base)
        for decoder in (fetched, cached):
            assert torch.equal(decoder.base.prompts(["red"]), local.base.prompts(["red"]))
            assert all(torch.equal(a, b) for a, b in zip(decoder.base.parameters(), local.base.parameters()))

    def test_the_switch_of_attention_reaches_both_networks(self, base, xformers, monkeypatch):
        decoder = ready(base, attention="xformers")
        switched = []
        for network in (decoder.base.unet, decoder.controlnet):
            monkeypatch.setattr(
                network, "enable_xformers_memory_efficient_attention", partial(switched.append, network)
            )
        cond = decoder.condition(noise(2, 4, 4, 8), size=(32, 32))
        for _ in range(2):
            decoder(noise(2, 4, 8, 8), torch.tensor([3.0, 700.0]), cond)
        assert switched == [decoder.base.unet, decoder.controlnet]
        xformers.fails = RuntimeError("no kernel")
        forget_attention()
        with pytest.raises(ConfigError, match=r"attention=xformers: xFormers does not run here: no kernel"):
            ready(base, attention="xformers")(noise(2, 4, 8, 8), torch.tensor([3.0, 700.0]), cond)

    def test_one_prompt_is_for_all_samples(self, base):
        """With guidance the batch is there twice, and the text is still one."""
        cond = ready(base).condition(noise(2, 4, 4, 8), size=(32, 32), extras={"caption": "red"})
        assert torch.equal(cond.text, ready(base).base.prompts(["red", "red"]))

    @pytest.mark.parametrize(
        ("extras", "reason"),
        [
            ({"words": ["red", "red"]}, r"data\.extra\.words: these are texts"),
            ({"prompt": "red"}, r"data\.extra\.prompt: these are texts"),
            ({"caption": ["red"]}, "one text for each"),
            ({"caption": ["red", "red", "red"]}, "one text for each"),
            ({"caption": ["red", None]}, "one text for each"),
        ],
    )
    def test_prompts_that_do_not_fit_are_refused(self, base, extras, reason):
        with pytest.raises(ConfigError, match=reason):
            ready(base).condition(noise(2, 4, 4, 8), size=(32, 32), extras=extras)

    def test_the_tokenizer_of_prompts_in_the_form_of_today(self, base, tmp_path):
        """Newer libraries write one file for the words, and 2.1 fills short prompts with another token than 1.5."""
        from transformers import CLIPTokenizer

        folder = shutil.copytree(base, tmp_path / "sd")
        words = CLIPTokenizer.from_pretrained(base / "tokenizer")
        shutil.rmtree(folder / "tokenizer")
        words.save_pretrained(folder / "tokenizer")
        (new, same), (old, digest) = load(str(folder), torch.float32), load(str(base), torch.float32)
        assert torch.equal(new.prompts(["red", ""]), old.prompts(["red", ""])) and same == digest
        words.pad_token = "a"
        words.save_pretrained(folder / "tokenizer")
        other, changed = load(str(folder), torch.float32)
        assert changed != digest and not torch.equal(other.prompts([""]), old.prompts([""]))
        shutil.rmtree(folder / "tokenizer")
        with pytest.raises(
            CheckpointError, match=r"has neither tokenizer\.json nor vocab\.json and merges\.txt"
        ):
            load(str(folder), torch.float32)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_a_base_of_half_precision(self, base, precision):
        decoder = ready(base, precision=precision)
        cond = decoder.condition(noise(2, 4, 4, 8), size=(32, 32))
        out = decoder(noise(2, 4, 8, 8), torch.tensor([3.0, 700.0]), cond)
        assert out.isfinite().all()
        out.float().sum().backward()
        assert (
            decoder.hint.conv_out.weight.grad is not None
            and decoder.hint.conv_out.weight.dtype == torch.float32
        )


def generators_of(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("StableDiffusionXLPipeline", "another architecture.*1.x and 2.x"),
            ("StableDiffusion3Pipeline", "another architecture"),
            ("DDPMPipeline", "no Stable Diffusion"),
        ],
    )
    def test_other_pipelines_by_name(self, tmp_path, name, reason):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(CheckpointError, match=f"is a {name}, {reason}"):
            made(tmp_path).borrow({})

    def test_what_is_no_pipeline(self, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"is no pipeline of diffusers: it has no model_index\.json"
        ):
            made(tmp_path).borrow({})
        with pytest.raises(CheckpointError, match="there is no such file or folder"):
            made(tmp_path / "nowhere").borrow({})
        with pytest.raises(CheckpointError, match=r"set model\.decoder\.sd_path"):
            StableDiffusion(StableDiffusion.Config(**tiny.SETTINGS), dim=8, spec=SPEC).borrow({})

    def test_a_base_of_another_size(self, base):
        with pytest.raises(
            CheckpointError,
            match=r"its U-Net has cross_attention_dim=16, and model.decoder.text_width says 768",
        ):
            made(base, text_width=None).borrow({})

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (
                lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
                "unet/diffusion_pytorch_model.safetensors",
            ),
            (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99), "vae"),
            (lambda f: (f / "tokenizer/vocab.json").unlink(), "vocab.json"),
            (lambda f: (f / "tokenizer/vocab.json").write_text("x"), "cannot be loaded as CLIPTokenizer"),
            (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: damaged"),
        ],
    )
    def test_damaged_pipelines(self, base, tmp_path, damage, reason):
        folder = shutil.copytree(base, tmp_path / "sd")
        damage(folder)
        with pytest.raises(CheckpointError, match=reason):
            made(folder).borrow({})

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"widths": (0, 8)}, r"\[0, 8\] must be at least 1"),
            ({"widths": (8, 15)}, "15 channels are not divisible by norm_groups=4"),
            ({"norm_groups": 0}, "0 must be at least 1"),
            ({"heads": (0, 4)}, r"\[0, 4\] must be at least 1"),
            ({"text_width": -1}, "-1 must be at least 1"),
        ],
    )
    def test_sizes_that_cannot_be(self, settings, reason):
        with pytest.raises(ValueError, match=reason):
            StableDiffusion.Config(**{**tiny.SETTINGS, **settings})

    @pytest.mark.parametrize("cls", [Adapter, StableDiffusion])
    def test_a_vae_of_another_kind(self, base, tmp_path, cls):
        from diffusers import AutoencoderKL

        folder = shutil.copytree(base, tmp_path / "sd")
        shutil.rmtree(folder / "vae")
        AutoencoderKL(norm_num_groups=4, block_out_channels=(4,)).save_pretrained(folder / "vae")
        with pytest.raises(CheckpointError, match="its VAE does not reduce pictures by 8"):
            made(folder, cls=cls).borrow({})
        AutoencoderKL(
            norm_num_groups=4, block_out_channels=(4,) * 4, latent_channels=8,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).save_pretrained(folder / "vae")  # fmt: skip
        with pytest.raises(CheckpointError, match="the latents of its VAE have 8 channels, not 4"):
            made(folder, cls=cls).borrow({})

    def test_samples_that_are_no_pictures(self, base):
        for spec in (
            DataSpec(channels=1, size=(32, 32), range=(-1.0, 1.0)),
            DataSpec(channels=3, size=(32, 32), range=(0.0, 1.0)),
        ):
            with pytest.raises(ValueError, match="Stable Diffusion takes pictures"):
                StableDiffusion(StableDiffusion.Config(**tiny.SETTINGS), dim=8, spec=spec)

    def test_another_scheduler(self, base):
        decoder = ready(base)
        decoder.check_scheduler(DDPM(DDPM.Config(**tiny.LEVELS)))
        for wrong in ({"beta_end": 0.02}, {"prediction": "v"}, {"num_steps": 500}):
            with pytest.raises(
                ValueError, match=r"take objective.scheduler={name: unet/ddpm, schedule: scaled_linear"
            ):
                decoder.check_scheduler(DDPM(DDPM.Config(**{**tiny.LEVELS, **wrong})))

    @pytest.mark.parametrize(
        "levels",
        [{"beta_schedule": "squaredcos_cap_v2"}, {"num_train_timesteps": 500}, {"beta_schedule": None}],
    )
    def test_the_scheduler_that_it_asks_for_is_the_right_one(self, base, levels):
        decoder = ready(base)
        given = {**decoder.base.levels, **levels}
        decoder.base.levels = {key: value for key, value in given.items() if value is not None}
        with pytest.raises(ValueError, match=r"take objective\.scheduler={") as error:
            decoder.check_scheduler(DDPM(DDPM.Config(**tiny.LEVELS)))
        told = yaml.safe_load(str(error.value).partition("objective.scheduler=")[2])
        assert told.pop("name") == "unet/ddpm"
        decoder.check_scheduler(DDPM(DDPM.Config(**told)))


def test_an_adapter_is_taken_from_a_tokenizer(base, tmp_path, monkeypatch):
    monkeypatch.setattr("vqcore_controlnet.sd.Latents", small_latents)
    network = Latents(8, (16, 8), 4)
    from safetensors.torch import save_file

    save_file(
        {f"decoder.latents.{n}": t for n, t in network.state_dict().items()}, tmp_path / "model.safetensors"
    )
    decoder = made(base, hint="adapter", adapter=str(tmp_path))
    decoder.fetch()
    decoder.borrow({})
    assert torch.equal(decoder.hint.adapter.conv_in.weight, network.conv_in.weight)
    assert decoder.condition(noise(1, 4, 4, 8), size=(32, 32)).hint.shape == (1, 8, 8, 8)
    with pytest.raises(CheckpointError, match="is no tokenizer with a controlnet/adapter"):
        made(base, hint="adapter", adapter=str(base / "vae")).fetch()
    with pytest.raises(CheckpointError, match="hint=adapter starts from a trained network"):
        made(base, hint="adapter").fetch()
    with pytest.raises(
        ValueError, match=r"adapter=here does nothing with hint=convolutions: set hint=adapter"
    ):
        made(base, adapter="here")


def small_latents(dim, **more):
    return Latents(dim, (16, 8), 4, **more)


@pytest.mark.parametrize("hint", ["adapter", "adapter-4m"])
def test_an_adapted_decoder_is_saved_and_loaded(base, tmp_path, monkeypatch, hint):
    """The run that the adapter came from is not needed again."""
    monkeypatch.setattr("vqcore_controlnet.sd.Latents", small_latents)
    tree = {
        "modality": {"name": "rgb"},
        "size": [32, 32],
        "model": {
            "encoder": {"name": "vit/encoder", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
            "quantizer": {"name": "quant/fsq", "levels": [4, 4]},
            "decoder": {"name": "controlnet/sd", "hint": hint, "sd_path": str(base), **tiny.SETTINGS},
        },
        "objective": {"name": "diffusion", "scheduler": {"name": "unet/ddpm", **tiny.LEVELS}},
    }
    tree["model"]["decoder"] |= {"widths": [8, 16], "heads": [4, 4], "attention_levels": [0]}
    tree["model"]["decoder"] |= {"adapter": "gone"} if hint == "adapter" else {}
    tokenizer = Tokenizer(from_tree(tree, schema=TokenizerConfig), fetch=False)
    tokenizer.borrow(Lender())
    tokenizer.eval().save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved", borrowed={"decoder.base": base})
    x = noise(1, 3, 32, 32).clamp(-1, 1)
    z = tokenizer.lookup(tokenizer.encode(x))
    hints = [each.decoder.condition(z, size=(32, 32)).hint for each in (tokenizer, again)]
    assert hints[0].shape == (1, 8, 8, 8) and torch.equal(*hints)


def words(base, run, *more):
    return [
        "train", str(ROOT / "cfgs/vqcontrolnet/smoke.yaml"), f"data.path={ROOT}/data/photos/train",
        f"data.extra_path.target={ROOT}/data/photos/train", f"data.eval_path={ROOT}/data/photos/heldout",
        f"data.eval_extra_path.target={ROOT}/data/photos/heldout",
        f"model.decoder.sd_path={base}", f"run.dir={run}", "run.device=cpu", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_by_the_command_line(base, tmp_path, capsys, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(words(base, whole, "run.steps=4")) == 0
    assert main(words(base, halves, "run.steps=2", "optim.horizon=4")) == 0
    assert main(words(base, halves, "run.steps=4", "optim.horizon=4")) == 0
    last = "checkpoints/step_4/model.safetensors"
    one, other = load_file(whole / last), load_file(halves / last)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not any(".base." in name for name in one) and any(
        name.startswith("decoder.controlnet.") for name in one
    )

    moved = shutil.copytree(base, tmp_path / "moved")
    assert main(["export", str(whole), str(tmp_path / "art")]) == 0
    text = (tmp_path / "art/provenance.json").read_text()
    assert str(base) not in text and "decoder.base" in text
    assert main(["tokenize", str(tmp_path / "art"), str(ROOT / "data/photos/heldout"), str(tmp_path / "tokens"),
                 "--borrow", f"decoder.base={moved}"]) == 0  # fmt: skip
    decode = [
        "decode",
        str(tmp_path / "art"),
        str(tmp_path / "tokens"),
        str(tmp_path / "out"),
        "steps=2",
        "guidance=2",
    ]
    assert main(decode) == 2
    assert "decoder.base" in capsys.readouterr().err
    assert main([*decode, "--borrow", f"decoder.base={tiny.save(tmp_path / 'other', seed=9)}"]) == 2
    assert "these are other weights than those of this tokenizer" in capsys.readouterr().err
    assert main([*decode, "--borrow", f"decoder.base={moved}"]) == 0
    assert list((tmp_path / "out").rglob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("objective.adversary={name: gan/hinge, discriminator: {name: gan/patch}}", "adversary"),
        (
            "objective.scheduler.prediction=v",
            "objective.scheduler: the base was trained with other noise levels",
        ),
    ],
)
def test_what_a_run_refuses(base, tmp_path, capsys, change, reason):
    assert main(words(base, tmp_path / "run", "run.steps=1", change)) == 2
    assert reason in capsys.readouterr().err
