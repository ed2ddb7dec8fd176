"""Pre-norm transformer blocks.

Papers: ViT (arXiv 2010.11929), equations 2 and 3; stochastic depth (arXiv 1603.09382).
Differs from the papers: there is no class token, and no normalization after the last block.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqcore.attention import Backend, attend

EPS = 1e-6
"""Epsilon of every LayerNorm."""


def linear(dim_in: int, dim_out: int, *, parts: int = 1) -> nn.Linear:
    """Make a linear layer, Xavier-uniform with zero bias; `parts` stacked layers are initialised like single layers."""
    layer = nn.Linear(dim_in, dim_out)
    bound = math.sqrt(6 / (dim_in + dim_out / parts))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Two linear layers with an activation function between them."""

    def __init__(self, dim: int, hidden: int, act: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.fc1 = linear(dim, hidden)
        self.act = act
        self.fc2 = linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Attention(nn.Module):
    """Self-attention over all tokens of a sample."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        backend: Backend = "auto",
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
    ):
        super().__init__()
        self.num_heads, self.backend, self.attn_dropout = num_heads, backend, attn_dropout
        self.qkv = linear(dim, 3 * dim, parts=3)
        self.proj = linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = rearrange(self.qkv(x), "b n (part h d) -> part b n h d", part=3, h=self.num_heads)
        left_out = self.attn_dropout if self.training else 0.0
        x = attend(q, k, v, backend=self.backend, dropout=left_out)
        return self.drop(self.proj(rearrange(x, "b n h d -> b n (h d)")))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch for whole samples and scale up the branch of the others."""

    def __init__(self, prob: float):
        super().__init__()
        self.prob = prob

    def forward(self, x: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
        if not self.training or self.prob == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.prob
        return x * keep / (1 - self.prob)


class Block(nn.Module):
    """Attention and then an MLP, each on a residual branch."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        backend: Backend = "auto",
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads, backend=backend, dropout=dropout, attn_dropout=attn_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, hidden, nn.GELU(), dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
