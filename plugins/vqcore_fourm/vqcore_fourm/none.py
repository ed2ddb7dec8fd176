"""The decoder of a tokenizer that has none."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.config import NoSettings
from vqcore.errors import CheckpointError
from vqcore.protocols import DataSpec


class NoDecoder(nn.Module):
    """Stands where a tokenizer has a decoder; it has no weights and refuses to decode."""

    last_layer: Tensor

    Config = NoSettings

    def __init__(self, cfg: NoSettings, *, dim: int, spec: DataSpec):
        super().__init__()
        # The contract of decoders asks for a tensor; nothing is trained here, so it is empty.
        self.register_buffer("last_layer", torch.empty(0), persistent=False)

    def forward(self, z_q: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b c *size"]:
        """Raise `CheckpointError`."""
        raise CheckpointError("this tokenizer cannot decode: it is a VQ of 4M, an encoder and a quantizer.")
