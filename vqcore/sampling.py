"""Sampling options: what a user may choose each time codes are decoded, such as the steps of a sampler.

The options of an objective are the keyword-only parameters of its `decode` besides `size`, `rng` and `extras`, written
`steps: Annotated[int, "Steps of the sampler."] = 25`. Types and checks are those of settings in a config.
"""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vqcore.compose.build import from_tree
from vqcore.compose.describe import type_text
from vqcore.errors import ConfigError, did_you_mean, listed

WIRING = ("size", "rng", "extras")
"""The parameters of `decode` that vqcore gives; no user chooses them."""
UNSTATED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One sampling option. `type` and `default` are `UNSTATED` where an objective leaves them out."""

    name: str
    type: Any
    default: Any
    text: str

    @property
    def type_text(self) -> str:
        """The type in words: `an integer`."""
        return "of no stated type" if self.type is UNSTATED else type_text(self.type)


def options(objective_cls: Any) -> list[Option]:
    """The sampling options of an objective's class, in the order of its `decode`."""
    found = []
    for name, parameter in inspect.signature(objective_cls.decode, eval_str=True).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name not in WIRING:
            annotation, notes = parameter.annotation, list[Any]()
            if typing.get_origin(annotation) is typing.Annotated:
                annotation, *notes = typing.get_args(annotation)
            text = next((note for note in notes if isinstance(note, str)), "")
            found.append(Option(name, annotation, parameter.default, " ".join(text.split())))
    return found


def resolved(objective_cls: Any, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All sampling options by name: those of `given`, checked and typed like settings, and the defaults of the others.

    `where` is a key of a config (`eval.sampling`) or `command line`. Raises `ConfigError` for an unknown option or a
    value of another type.
    """
    known = options(objective_cls)
    names = [option.name for option in known]
    given = {name: value.item() if hasattr(value, "item") else value for name, value in given.items()}
    for name in given:
        if not names:
            raise ConfigError(f"{where}: {name}: this objective has no sampling options.")
        if name not in names:
            hint = did_you_mean(name, names) or f" Options: {listed(names)}."
            raise ConfigError(f"{where}: {name} is not a sampling option of this objective.{hint}")
    fields = [(one.name, one.type, _field(one.default)) for one in known]
    schema = dataclasses.make_dataclass("Sampling", fields, kw_only=True)
    chosen: Any = from_tree(given, schema=schema, file=where)
    return {name: getattr(chosen, name) for name in names}


def _field(default: Any) -> Any:
    return dataclasses.field() if default is UNSTATED else dataclasses.field(default_factory=lambda: default)
