"""From the names of tensors in 4M's VQControlNet to those of `controlnet/sd`, and what is the base's."""

from collections.abc import Mapping

from torch import Tensor

HINT = "controlnet.controlnet_cond_embedding."
BASE = {"vae.": "vae.", "decoder.unet.": "unet.", "decoder.text_encoder.": "text."}
"""How names of the base begin in a whole model of 4M, and in `controlnet/sd`'s `base`."""
COMPUTED = "decoder.empty_str_encoding"
"""What the text encoder makes of the empty prompt; it is computed here."""


def decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained state of `controlnet/sd`, from the tensors of 4M's decoder (names without `decoder.`)."""
    return {
        name.replace(f"{HINT}adapter_model.", "hint.adapter.").replace(HINT, "hint."): tensor
        for name, tensor in state.items()
        if name.startswith("controlnet.")
    }
