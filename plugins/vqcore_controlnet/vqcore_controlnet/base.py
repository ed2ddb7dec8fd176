"""Stable Diffusion in the folder layout of diffusers: a VAE, a U-Net, a text encoder. All of it is borrowed.

Paper: latent diffusion (arXiv 2112.10752). Versions 1.x and 2.x share this layout; XL and 3 do not, and are refused.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.borrowed import NotThere, found, read
from vqcore.errors import CheckpointError, first_line, listed
from vqcore.protocols import DataSpec
from vqcore.reading import read_json
from vqcore.rng import randn

PARTS = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
"""Folders of the networks, and the classes that read them."""
FACTOR = 8
"""Pixels of a picture for one position of its latents."""
_STEMS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}
_WORDS = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_OTHERS = ("XL", "3", "Cascade", "Upscale", "Inpaint", "Depth2Img")


class Base(nn.Module):
    """The three networks, the tokenizer of prompts, and the noise levels of the training."""

    vae: Any
    unet: Any
    text: Any

    def __init__(self, networks: Mapping[str, nn.Module], words: Any, levels: Mapping[str, Any]):
        super().__init__()
        self.vae, self.unet, self.text = (networks[name] for name in PARTS)
        self.words, self.levels = words, dict(levels)

    def latents(
        self, x: Float[Tensor, "b 3 h w"], rng: Sequence[torch.Generator]
    ) -> Float[Tensor, "b c h2 w2"]:
        """Scaled latents, drawn from the posterior of the VAE."""
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        drawn = randn(rng, *posterior.mean.shape[1:], device=x.device)
        return (posterior.mean.float() + posterior.std.float() * drawn) * self.vae.config.scaling_factor

    def pictures(self, z: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures of scaled latents, in [-1, 1]."""
        x = self.vae.decode(z.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return x.float().clamp(-1, 1)

    def prompts(self, texts: Sequence[str]) -> Float[Tensor, "b n d"]:
        """What the text encoder makes of prompts; equal prompts are encoded once. Long prompts are cut."""
        unique = list(dict.fromkeys(texts))
        most = self.text.config.max_position_embeddings
        ids = self.words(
            unique, padding="max_length", max_length=most, truncation=True, return_tensors="pt"
        ).input_ids
        encoded = self.text(ids.to(self.text.device))[0]
        return encoded[torch.tensor([unique.index(text) for text in texts], device=encoded.device)]


def load(place: str, dtype: torch.dtype) -> tuple[Base, str]:
    """Stable Diffusion from a folder or `hf://` id, and the SHA-256 of its weights and words.

    Raises `CheckpointError` for what is no such pipeline, for missing files and for weights that do not fit.
    """
    _check_index(place)
    digest = hashlib.sha256()
    networks: dict[str, nn.Module] = {}
    for part in PARTS:
        config, weights = _file(place, f"{part}/config.json"), _weights(place, part)
        digest.update(f"{part} {read(weights)[1]}\n".encode())
        networks[part] = _network(part, config.parent, safe=weights.endswith(".safetensors"), dtype=dtype)
    words = _words(place)
    known = [sorted(words.get_vocab().items()), words.pad_token_id]
    digest.update(json.dumps(known).encode())
    levels = read_json(_file(place, "scheduler/scheduler_config.json"), CheckpointError, dict)
    return Base(networks, words, levels), digest.hexdigest()


def _words(place: str) -> Any:
    """The tokenizer of prompts. Its files say with which token short prompts are filled: 2.x has another than 1.x."""
    files: dict[str, Path] = {}
    for name in _WORDS:
        with suppress(NotThere):
            files[name] = _file(place, f"tokenizer/{name}")
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
        raise CheckpointError(f"{place}/tokenizer: has neither tokenizer.json nor vocab.json and merges.txt")
    from transformers import CLIPTokenizer

    folder = next(iter(files.values())).parent
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library has its own errors for files that it cannot read
        raise CheckpointError(f"{folder}: cannot be loaded as CLIPTokenizer: {first_line(error)}") from error


def load_vae(place: str) -> tuple[Any, str]:
    """The VAE of Stable Diffusion alone, fp32, and the SHA-256 of its weights. Raises `CheckpointError`."""
    _check_index(place)
    folder, weights = _file(place, "vae/config.json").parent, _weights(place, "vae")
    vae = _network("vae", folder, safe=weights.endswith(".safetensors"), dtype=torch.float32)
    check_vae(vae, place)
    return vae, read(weights)[1]


def check_vae(vae: Any, place: str) -> None:
    """Raise `CheckpointError` for a VAE whose latents are not those of Stable Diffusion 1.x and 2.x."""
    cfg = vae.config
    if cfg.latent_channels != 4:
        raise CheckpointError(f"{place}: the latents of its VAE have {cfg.latent_channels} channels, not 4")
    if 2 ** (len(cfg.block_out_channels) - 1) != FACTOR:
        raise CheckpointError(f"{place}: its VAE does not reduce pictures by {FACTOR}")


def check_pictures(spec: DataSpec) -> None:
    """Raise `ValueError` for samples that are no pictures in [-1, 1]."""
    if spec.channels != 3 or spec.rank != 2 or spec.labels is not None:
        raise ValueError("Stable Diffusion takes pictures of three channels: take the modality rgb")
    if spec.range is None or max(abs(spec.range[0] + 1), abs(spec.range[1] - 1)) > 1e-6:
        raise ValueError(
            "Stable Diffusion takes pictures in [-1, 1]: leave mean and std of the modality at 0.5"
        )


def _check_index(place: str) -> None:
    try:
        index = _file(place, "model_index.json")
    except NotThere as error:
        if not Path(place).exists():
            raise
        raise CheckpointError(
            f"{place}: is no pipeline of diffusers: it has no model_index.json. Give the folder "
            "of Stable Diffusion 1.5 or 2.1"
        ) from error
    name = str(read_json(index, CheckpointError, {"_class_name": str})["_class_name"])
    if name != "StableDiffusionPipeline":
        is_other = name.startswith("StableDiffusion") and any(word in name for word in _OTHERS)
        why = "another architecture" if is_other else "no Stable Diffusion"
        raise CheckpointError(f"{place}: is a {name}, {why}. Stable Diffusion 1.x and 2.x can be the base")


def _file(place: str, inside: str) -> Path:
    return found(f"{place}#{inside}" if place.startswith("hf://") else f"{place.rstrip('/')}/{inside}")


def _weights(place: str, part: str) -> str:
    """The place of a network's weights: safetensors, or a pickle of plain tensors."""
    names = [
        f"{part}/{_STEMS[part]}.safetensors",
        f"{part}/{'pytorch_model' if part == 'text_encoder' else _STEMS[part]}.bin",
    ]
    problem: CheckpointError | None = None
    for name in names:
        try:
            return str(_file(place, name))
        except CheckpointError as error:
            problem = problem or error
    raise problem or CheckpointError(place)


def _network(part: str, folder: Path, *, safe: bool, dtype: torch.dtype) -> nn.Module:
    library: Any
    if part == "text_encoder":
        import transformers as library
    else:
        import diffusers as library
    from transformers.utils import logging as bars

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)  # what they warn of is an error here, or of no use
        bars.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network, facts = getattr(library, PARTS[part]).from_pretrained(
                folder,
                use_safetensors=safe,
                local_files_only=True,
                output_loading_info=True,
                torch_dtype=dtype,
            )
    except Exception as error:  # each library has its own errors for files that do not fit
        raise CheckpointError(f"{folder}: cannot be loaded as {PARTS[part]}: {first_line(error)}") from error
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)
    unused = [name for name in facts["unexpected_keys"] if not name.endswith("position_ids")]
    wrong = [*facts["missing_keys"], *unused, *map(str, facts.get("mismatched_keys", ()))]
    if wrong:
        raise CheckpointError(f"{folder}: weights of {PARTS[part]} that do not fit: {listed(wrong, 4)}")
    return network
