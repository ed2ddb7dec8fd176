"""Shapes and types are checked at run time in every module of ours that writes shapes down, that is, imports jaxtyping.

mypy looks after the others. A check costs more than many a function, so all modules would take twice the time.
"""

from pathlib import Path

from jaxtyping import install_import_hook

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


install_import_hook(_with_shapes(), "beartype.beartype")
