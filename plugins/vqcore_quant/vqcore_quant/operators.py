"""Register functions as custom operators of torch, which `torch.compile` does not trace.

Differs from `torch.library.custom_op`: the first call does not import torch's compiler, because this import takes
longer than many short commands. There is also no check that a result is not a view of an argument; no operator here
returns a view.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("vqcore_quant", "FRAGMENT")


def operator(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register a pure function as the operator `vqcore_quant::<name>`; `fake` returns empty results of the same shapes.

    The operator's schema comes from the annotations of `kernel`. The operator has no gradient; see `differentiable`.
    """
    _LIBRARY.define(name + torch.library.infer_schema(kernel, mutates_args=()))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqcore_quant::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vqcore_quant, name).default


def differentiable(name: str, backward: Callable[..., Any], remember: Callable[..., None]) -> None:
    """Register the gradient of the operator `name`; `remember` stores the tensors that `backward` needs."""
    torch.library.register_autograd(f"vqcore_quant::{name}", backward, setup_context=remember, lib=_LIBRARY)
