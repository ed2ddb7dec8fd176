"""Functions as operators of torch that a compiler does not look into.

Differs from `torch.library.custom_op`: the first call loads no compiler, which takes longer than many a short command.
Nor is there a check that a result is no view of an argument; nothing here returns one.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("vqcore_quant", "FRAGMENT")


def operator(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make a pure function the operator `vqcore_quant::<name>`; `fake` gives empty results of the same shapes.

    The annotations of `kernel` are the operator's schema. It has no gradient; see `differentiable`.
    """
    _LIBRARY.define(name + torch.library.infer_schema(kernel, mutates_args=()))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqcore_quant::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vqcore_quant, name).default


def differentiable(name: str, backward: Callable[..., Any], remember: Callable[..., None]) -> None:
    """Give the operator `name` a gradient; `remember` keeps what `backward` needs."""
    torch.library.register_autograd(f"vqcore_quant::{name}", backward, setup_context=remember, lib=_LIBRARY)
