"""Self-attention of tokens, by the most economical kernel that runs on the tensor at hand.

Papers: the Transformer (arXiv 1706.03762), equation 1; memory that does not grow with the square of the tokens
(arXiv 2112.05682, 2205.14135), which is what torch's `scaled_dot_product_attention` and xFormers do.
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
    """Average `v` with the softmax of the scaled products of `q` and `k`, of which the share `dropout` is left out.

    Raises `ConfigError` when xFormers is asked for by name and cannot run.
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
    """Settle `auto` for such a tensor, and say it once: xFormers where it runs, else torch's own."""
    if backend in ("sdpa", "math"):
        return backend
    if backend == "auto" and torch.compiler.is_compiling():
        return "sdpa"
    problem = _problem(q.device, q.dtype, tuple(q.shape), q.requires_grad)
    if problem and backend == "xformers":
        raise ConfigError(f"attention=xformers: {problem}. attention=auto takes what runs, here sdpa.")
    chosen: Backend = "sdpa" if problem else "xformers"
    _announce(chosen, q.device.type, problem)
    return chosen


@functools.cache
def _problem(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], grad: bool) -> str:
    """Why xFormers cannot attend to such tensors; empty when it can.

    It is tried, since it also imports where it has no kernel: on a CPU, or beside a torch it was not built for.
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
    except Exception as error:  # whatever it is, it means no
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        return f"xFormers does not run here: {first}"
    return ""


@functools.cache
def _xformers() -> Any:
    try:
        from xformers import ops
    except Exception:  # a build for another torch fails in ways of its own
        return None
    return ops


@functools.cache
def _announce(chosen: str, device: str, problem: str) -> None:
    say(f"attention on {device}: {chosen}{f' ({problem})' if problem else ''}")
