"""The encoder of a tokenizer as a feature extractor, as terratorch's `VQBackbone`."""

from typing import Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.tokenizer import Tokenizer

Out = Literal["embedding", "latent", "quantized"]


class Backbone(nn.Module):
    """Features of the encoder, `(b, d, h, w)`, with gradients: for a head that is trained on them.

    `out`: embedding, a list of the outputs of all blocks, the last one after the MLP behind them; latent, the input of
    the quantizer; quantized, its output. Unlike terratorch's registry, it also takes the land-cover tokenizers.
    """

    def __init__(self, tokenizer: Tokenizer, out: Out = "embedding"):
        super().__init__()
        self.tokenizer, self.out = tokenizer, out

    def forward(
        self, x: Float[Tensor, "b c h w"] | Tensor
    ) -> list[Float[Tensor, "b d i j"]] | Float[Tensor, "b d i j"]:
        """The features of inputs as `Tokenizer.encode` takes them: standardised bands, or class ids `(b, h, w)`."""
        made = self.tokenizer
        if self.out == "embedding":
            return [rearrange(each, "b h w d -> b d h w") for each in self._blocks(made.embedded(x))]
        z = made.latents(x)
        return rearrange(z if self.out == "latent" else made.quantize(z).z_q, "b h w d -> b d h w")

    def _blocks(self, x: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b i j d"]]:
        encoder, seen = self.tokenizer.encoder, list[Tensor]()
        blocks: nn.ModuleList = encoder.blocks
        handles = [
            block.register_forward_hook(lambda module, inputs, output: seen.append(output))
            for block in blocks
        ]
        try:
            last = encoder(x)
        finally:
            for handle in handles:
                handle.remove()
        return [each.unflatten(1, last.shape[1:-1]) for each in seen[:-1]] + [last]
