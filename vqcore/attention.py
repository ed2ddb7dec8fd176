"""Attention of tokens, with xFormers or with a kernel of torch: the switch that all transformers share.

Papers: the Transformer (arXiv 1706.03762), equation 1; attention whose memory does not grow with the square of the
number of tokens (arXiv 2112.05682, 2205.14135), as in torch's `scaled_dot_product_attention` and in xFormers.
"""

import functools
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqcore.console import say
from vqcore.errors import ConfigError

Backend = Literal["auto", "sdpa", "xformers", "math"]
_ALIGNED = 8
"""xFormers wants each row of a bias to begin at a multiple of this many numbers."""


def attend(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b m h d"],
    v: Float[Tensor, "b m h d"],
    *,
    visible: Bool[Tensor, "b m"] | None = None,
    backend: Backend = "auto",
    dropout: float = 0.0,
) -> Float[Tensor, "b n h d"]:
    """Scaled dot-product attention; `dropout` is the probability that an attention weight is dropped.

    `visible` is True where a key may be seen; every sample needs one such key. Raises `ConfigError` if `backend` is
    xformers and xFormers cannot run.
    """
    chosen = choose(backend, q, k, visible is not None)
    if chosen == "xformers":
        return _with_xformers(q, k, v, visible, dropout)
    mask = None if visible is None else visible[:, None, None]
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    if chosen == "math":
        with sdpa_kernel(SDPBackend.MATH):
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return rearrange(x, "b h n d -> b n h d")


def choose(
    backend: Backend, q: Float[Tensor, "b n h d"], k: Float[Tensor, "b m h d"], masked: bool = False
) -> Backend:
    """Choose the kernel. `auto` takes xFormers where it runs and else sdpa, and prints the choice once."""
    if backend in ("sdpa", "math"):
        return backend
    if backend == "auto" and torch.compiler.is_compiling():
        return "sdpa"
    grad = q.requires_grad or k.requires_grad
    problem = _problem(_Call(q.device, q.dtype, tuple(q.shape), tuple(k.shape), masked, grad))
    if problem and backend == "xformers":
        raise ConfigError(f"attention=xformers: {problem}. Use attention=auto, which takes sdpa here.")
    chosen: Backend = "sdpa" if problem else "xformers"
    _announce(chosen, q.device.type, problem)
    return chosen


class _Call(NamedTuple):
    """What decides whether xFormers can run."""

    device: torch.device
    dtype: torch.dtype
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    masked: bool
    grad: bool


@functools.cache
def _problem(call: _Call) -> str:
    """The reason why xFormers cannot run on tensors of this kind; empty if xFormers can run.

    The function runs xFormers once, because xFormers can be imported even without a kernel: on a CPU, or with a torch
    version for which xFormers was not built.
    """
    if _xformers() is None:
        return "xFormers is not installed"
    try:
        with torch.enable_grad():
            q, k = (
                torch.zeros(shape, dtype=call.dtype, device=call.device, requires_grad=call.grad)
                for shape in (call.queries, call.keys)
            )
            visible = None
            if call.masked:
                visible = torch.ones(k.shape[:2], dtype=torch.bool, device=call.device)
            out = _with_xformers(q, k, k, visible, 0.0)
            if call.grad:
                out.sum().backward()
    except Exception as error:  # every error means that xFormers cannot run
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        return f"xFormers does not run here: {first}"
    return ""


def _with_xformers(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float) -> Tensor:
    """Run xFormers, which takes hidden keys as a bias of its own shape and alignment."""
    bias = None
    if visible is not None:
        (b, n, h, _), m = q.shape, k.shape[1]
        room = -(-m // _ALIGNED) * _ALIGNED
        bias = torch.zeros(b, 1, 1, room, dtype=q.dtype, device=q.device)[..., :m]
        bias = bias.masked_fill_(~visible[:, None, None], -torch.inf).expand(b, h, n, m)
    return _xformers().memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout)


@functools.cache
def _xformers() -> Any:
    try:
        from xformers import ops
    except Exception:  # a build for another version of torch can raise any error
        return None
    return ops


@functools.cache
def _announce(chosen: str, device: str, problem: str) -> None:
    say(f"attention on {device}: {chosen}{f' ({problem})' if problem else ''}")
