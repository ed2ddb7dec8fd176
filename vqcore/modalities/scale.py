"""From the units of files to numbers of size 1 and back, by settings that the artefact carries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vqcore.errors import SettingError, listed

SLACK = 0.01
"""Values may lie outside a declared range by this share of the range; such values are clipped."""
NEVER = 1e37
"""No measurement is as large. Files use such numbers for what is missing, e.g. GDAL -3.4e38."""
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

Numbers = float | tuple[float, ...]
"""One number, or one for each channel."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How values become numbers of size 1. Each number is for all channels, or a list has one for each channel.

    range: low and high become -1 and 1, and values outside are refused. robust: the same, but values outside are
    welcome (give quantiles, e.g. 1 % and 99 %). standard: minus mean, divided by std. log: the logarithms of low and
    high become -1 and 1; all values are above 0. arcsinh: arcsinh((value - centre) / width), which is linear within
    `width` of the centre and a logarithm far outside.
    """

    kind: Literal["range", "robust", "standard", "log", "arcsinh"]
    """range, robust, standard, log or arcsinh."""
    low: Numbers | None = None
    """range, robust, log: the value that becomes -1."""
    high: Numbers | None = None
    """range, robust, log: the value that becomes 1."""
    mean: Numbers | None = None
    """standard: the value that becomes 0."""
    std: Numbers | None = None
    """standard: the deviation that becomes 1."""
    centre: Numbers | None = None
    """arcsinh: the value that becomes 0."""
    width: Numbers | None = None
    """arcsinh: the distance from the centre that becomes 0.88."""

    def __post_init__(self) -> None:
        first, second = names = _NAMES[self.kind]
        for name in ("low", "high", "mean", "std", "centre", "width"):
            if name not in names and getattr(self, name) is not None:
                raise SettingError(name, f"does nothing with kind '{self.kind}', which takes {listed(names)}")
            if name in names and getattr(self, name) is None:
                raise SettingError(
                    name,
                    f"is required by kind '{self.kind}'. vqcore check CONFIG --values proposes numbers",
                )
        lows, highs = _row(getattr(self, first)), _row(getattr(self, second))
        if len(lows) != len(highs) and 1 not in (len(lows), len(highs)):
            raise SettingError(
                second,
                f"has {len(highs)} numbers and {first} has {len(lows)}; give both one for each channel",
            )
        if second in ("std", "width") and not (highs > 0).all():
            raise SettingError(second, f"{_shown(highs)} must be above 0")
        if second == "high" and not (lows < highs).all():
            raise SettingError(second, f"{_shown(highs)} must be above low={_shown(lows)}")
        if self.kind == "log" and not (lows > 0).all():
            raise SettingError(
                "low",
                f"{_shown(lows)} must be above 0: only such values have a logarithm; arcsinh takes all values",
            )

    @property
    def bounded(self) -> bool:
        """Do all numbers lie in -1..1?"""
        return self.kind == "range"

    @property
    def channels(self) -> int | None:
        """The number of channels that the settings name, or None if they fit any number."""
        count = max(len(_row(getattr(self, name))) for name in _NAMES[self.kind])
        return None if count == 1 else count

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values `(c, ...)` in the units of the files as single-precision numbers; a copy. NaN stays NaN."""
        first, second = self._numbers(values.ndim)
        wide = values.astype(np.float64)
        if self.kind == "standard":
            wide = (wide - first) / second
        elif self.kind == "arcsinh":
            wide = np.arcsinh((wide - first) / second)
        elif self.kind == "log":
            wide = np.log(wide / first) * (2 / np.log(second / first)) - 1
        else:
            wide = (wide - first) * (2 / (second - first)) - 1
        return (np.clip(wide, -1, 1) if self.bounded else wide).astype(np.float32)

    def decode(self, x: np.ndarray) -> np.ndarray:
        """Numbers `(c, ...)` in the units of the files, in single precision: the inverse of `encode`."""
        first, second = self._numbers(x.ndim)
        wide = x.astype(np.float64)
        with np.errstate(over="ignore"):  # an untrained decoder may say anything
            if self.kind == "standard":
                wide = wide * second + first
            elif self.kind == "arcsinh":
                wide = np.sinh(wide) * second + first
            elif self.kind == "log":
                wide = first * np.exp((wide + 1) * (np.log(second / first) / 2))
            else:
                wide = (wide + 1) * ((second - first) / 2) + first
        return np.clip(wide, -_HUGE, _HUGE).astype(np.float32)

    def outside(self, values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, str]:
        """Which known values `(c, ...)` the scale refuses, and why the first one: words that follow `the value 7`."""
        first, second = self._numbers(values.ndim)
        wide = values.astype(np.float64)
        if self.kind == "log":
            return known & (wide < _TINY), "has no logarithm; scale.kind=arcsinh takes all values"
        if self.kind != "range":
            return np.zeros(values.shape, bool), ""
        slack = SLACK * (second - first)
        wrong = known & ((wide < first - slack) | (wide > second + slack))
        if not wrong.any():
            return wrong, ""
        place = tuple(np.argwhere(wrong)[0])
        low, high = (np.broadcast_to(one, values.shape)[place] for one in (first, second))
        return wrong, f"lies outside the declared range {low:g} to {high:g}"

    def _numbers(self, ndim: int) -> tuple[np.ndarray, np.ndarray]:
        """The two settings of this kind, with one axis for channels and one for each other axis."""
        first, second = (_row(getattr(self, name)) for name in _NAMES[self.kind])
        shape = (-1,) + (1,) * (ndim - 1)
        return first.reshape(shape), second.reshape(shape)


_NAMES = {
    "range": ("low", "high"),
    "robust": ("low", "high"),
    "standard": ("mean", "std"),
    "log": ("low", "high"),
    "arcsinh": ("centre", "width"),
}
"""The two settings of each kind."""


def missing(values: np.ndarray, nodata: Sequence[float]) -> np.ndarray:
    """Where values stand for nothing: masked ones, the numbers of `nodata`, NaN, infinity and what beats `NEVER`."""
    plain = np.ma.getdata(values)
    found = np.ma.getmaskarray(values) | declared(plain, nodata)
    return found | broken(plain) if plain.dtype.kind == "f" else found


def declared(values: np.ndarray, nodata: Sequence[float]) -> np.ndarray:
    """Where values are numbers of `nodata`, as the type of the values holds them: -9999.9 has another float32."""
    found = np.isin(values, nodata)
    if values.dtype.kind != "f":
        return found
    with np.errstate(over="ignore"):
        return found | np.isin(values, np.asarray(nodata, values.dtype))


def broken(values: np.ndarray) -> np.ndarray:
    """Where values are no measurement: NaN, infinity and what beats `NEVER`."""
    return ~(np.abs(values) < NEVER)


def _row(numbers: Numbers) -> np.ndarray:
    return np.atleast_1d(np.asarray(numbers, np.float64))


def _shown(numbers: np.ndarray) -> str:
    return f"{numbers[0]:g}" if len(numbers) == 1 else str([float(f"{number:g}") for number in numbers])
