"""Self-attention of tokens, with xFormers or with a kernel of torch.

Papers: the Transformer (arXiv 1706.03762), equation 1; attention whose memory does not grow with the square of the
number of tokens (arXiv 2112.05682, 2205.14135), as in torch's `scaled_dot_product_attention` and in xFormers.
"""

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqcore.console import say
from vqcore.errors import ConfigError

Backend = Literal["auto", "sdpa", "xformers", "math"]


def attend(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h d"],
    *,
    backend: Backend = "auto",
    dropout: float = 0.0,
) -> Float[Tensor, "b n h d"]:
    """Scaled dot-product attention; `dropout` is the probability that an attention weight is dropped.

    Raises `ConfigError` if `backend` is xformers and xFormers cannot run.
    """
    chosen = choose(backend, q)
    if chosen == "xformers":
        return _xformers().memory_efficient_attention(q, k, v, p=dropout)
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    if chosen == "math":
        with sdpa_kernel(SDPBackend.MATH):
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return rearrange(x, "b h n d -> b n h d")


def choose(backend: Backend, q: Float[Tensor, "b n h d"]) -> Backend:
    """Choose the kernel. `auto` takes xFormers where it runs and else sdpa, and prints the choice once."""
    if backend in ("sdpa", "math"):
        return backend
    if backend == "auto" and torch.compiler.is_compiling():
        return "sdpa"
    problem = _problem(q.device, q.dtype, tuple(q.shape), q.requires_grad)
    if problem and backend == "xformers":
        raise ConfigError(f"attention=xformers: {problem}. Use attention=auto, which takes sdpa here.")
    chosen: Backend = "sdpa" if problem else "xformers"
    _announce(chosen, q.device.type, problem)
    return chosen


@functools.cache
def _problem(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], grad: bool) -> str:
    """The reason why xFormers cannot run on tensors of this kind; empty if xFormers can run.

    The function runs xFormers once, because xFormers can be imported even without a kernel: on a CPU, or with a torch
    version for which xFormers was not built.
    """
    ops = _xformers()
    if ops is None:
        return "xFormers is not installed"
    try:
        with torch.enable_grad():
            q = torch.zeros(shape, dtype=dtype, device=device, requires_grad=grad)
            out = ops.memory_efficient_attention(q, q, q, p=0.0)
            if grad:
                out.sum().backward()
    except Exception as error:  # every error means that xFormers cannot run
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        return f"xFormers does not run here: {first}"
    return ""


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
