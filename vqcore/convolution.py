"""Convolutions on one, two or three axes, for every network that is built for data of any rank."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """torch's convolution on three axes, which a CPU computes in fp32 where bf16 is asked for.

    In bf16 the gradient of the weights reads memory that was never written if the first axis is shorter than the
    kernel (torch 2.14 on x86), so that it is wrong or infinite.
    """

    def forward(self, input: Float[Tensor, "*b c t h w"]) -> Float[Tensor, "*b c_out t_out h_out w_out"]:
        """The result in the type that torch would give."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        if input.device.type != "cpu" or dtype != torch.bfloat16:
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(input.float(), self.weight.float(), bias).to(dtype)


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: Conv3d}
"""The class for each number of axes."""
