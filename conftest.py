"""Shapes and types are checked at run time in every function of ours that writes shapes down, with jaxtyping.

mypy looks after the others. A check costs more than many a function.
"""

from collections.abc import Callable
from inspect import isclass
from pathlib import Path
from typing import Any, get_args

import jaxtyping

HERE = Path(__file__).parent
ROOTS = [HERE, *(HERE / "plugins").iterdir(), *(HERE / "examples").iterdir()]


def _with_shapes() -> list[str]:
    """The names of the modules that import jaxtyping."""
    found = []
    for root in ROOTS:
        for path in root.glob("vqcore*/**/*.py"):
            if "from jaxtyping import" in path.read_text():
                found.append(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    return found


def _is_shape(hint: Any) -> bool:
    return (isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(
        map(_is_shape, get_args(hint))
    )


def _only_shapes(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """jaxtyping's decorator, which leaves a function or class as it is if none of its hints is a shape."""

    def decorator(*, typechecker: Any) -> Callable[[Any], Any]:
        def decorate(what: Any) -> Any:
            hints = getattr(what.fget if isinstance(what, property) else what, "__annotations__", {})
            return jaxtyped(what, typechecker=typechecker) if any(map(_is_shape, hints.values())) else what

        return decorate

    return decorator


jaxtyping.jaxtyped = _only_shapes(jaxtyping.jaxtyped)
jaxtyping.install_import_hook(_with_shapes(), "beartype.beartype")
