"""Schedulers whose samplers are those of diffusers, with right times where diffusers 0.42 errs.

Papers: DDPM (arXiv 2006.11239), DDIM (arXiv 2010.02502), PNDM (arXiv 2202.09778), dynamic thresholding (arXiv
2205.11487, section 2.3). `docs/diffusion.md` lists what diffusers and 4M do otherwise.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vqcore.config import at_least, refuse_idle
from vqcore.diffusion import epsilon, x_0
from vqcore.errors import ConfigError, SettingError, did_you_mean, first_line
from vqcore.rng import randn
from vqcore_unet.table import Table, TableConfig, check_steps, names_of, spaced

LEAST_SHARE = 1e-6
"""Zero SNR has no logarithm: for samplers that need one, the last alpha_bar is this share of the last but one."""

MOST_SIGMA = 80.0
"""Where steps are even in a power or in the logarithm of sigma, noise over signal, they begin here at zero SNR, which
has no sigma (EDM, arXiv 2206.00364, table 1)."""
LEAST_SIGNAL = 1e-3
"""Least share of the signal by which fp32 can be divided in several steps."""

STEP = ("model_output", "timestep", "sample")
"""What a step of every sampler is called with."""


@dataclass(frozen=True, kw_only=True)
class SpacingConfig(TableConfig):
    """Settings of samplers that visit entries of the table."""

    spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    """Entries that sampling visits: trailing begins at the last, leading never visits it, linspace has both ends."""
    steps_offset: int = 0
    """Added to the times of `leading`; Stable Diffusion has 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_offset and self.spacing != "leading":
            raise SettingError(
                "steps_offset", f"{self.steps_offset} does nothing with spacing={self.spacing}; leave it out"
            )
        if not 0 <= self.steps_offset < self.num_steps:
            raise SettingError(
                "steps_offset", f"{self.steps_offset} must be in [0, num_steps={self.num_steps})"
            )


@dataclass(frozen=True, kw_only=True)
class ClippingConfig(SpacingConfig):
    """Settings of samplers that may bound the samples that they predict."""

    clip: float | None = None
    """Predicted samples are clipped to [-clip, clip]: 1 for data in [-1, 1], null for data without bounds."""
    threshold: float | None = None
    """Dynamic thresholding instead of `clip`: this quantile of a sample's sizes, if above 1, is scaled to 1."""
    threshold_max: float | None = None
    """The quantile counts no more than this. With 1, as in 4M, thresholding is clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and not self.clip > 0:
            raise SettingError("clip", f"{self.clip} must be above 0, or null")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise SettingError("threshold", f"{self.threshold} must be in (0, 1], or null")
        if self.threshold is not None and self.clip is not None:
            raise SettingError(("clip", "threshold"), "clip and threshold are both set; take one of them")
        if self.threshold_max is not None and self.threshold is None:
            raise SettingError("threshold_max", f"{self.threshold_max} does nothing without threshold")
        at_least(self, threshold_max=1)

    def bounds(self) -> dict[str, Any]:
        """The same settings by the names of diffusers."""
        most = float("inf") if self.threshold_max is None else self.threshold_max
        return {
            "clip_sample": self.clip is not None,
            "clip_sample_range": self.clip or 1.0,
            "thresholding": self.threshold is not None,
            "dynamic_thresholding_ratio": self.threshold or 0.995,
            "sample_max_value": most,
        }


class DDPM(Table):
    """Diffusion; every step of the sampler but the last adds noise."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ClippingConfig):
        """Settings of `unet/ddpm`."""

        variance: Literal["fixed_small", "fixed_small_log", "fixed_large"] = "fixed_small"
        """Variance of the noise that a step adds: the posterior's, or the larger one of the forward process."""

    def sampler(self, steps: int) -> "Walk":
        """One walk of `steps` steps."""
        cfg: Any = self.cfg
        library = _diffusers()
        # 4M ignores the spacing; its leading times are those of diffusers.
        times = spaced(steps, self.num_steps, "leading" if cfg.as_4m else cfg.spacing, cfg.steps_offset)
        # diffusers adds noise at every time but 0. The small variance of a step to the sample itself is 0.
        last = cfg.variance if cfg.as_4m else "fixed_small"
        inner, end = (
            _filled(self, library.DDPMScheduler, variance_type=variance, **cfg.bounds())
            for variance in (cfg.variance, last)
        )
        for one in (inner, end):
            one.set_timesteps(timesteps=times)
        return Walk(inner, times, noisy="generator", last=end)


class DDIM(Table):
    """Diffusion; the sampler goes straight to the next noise level."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ClippingConfig):
        """Settings of `unet/ddim`."""

        eta: float = 0.0
        """Noise that a step adds: 0 for none, 1 for as much as DDPM."""
        final_alpha_one: bool = True
        """Does the last step remove all noise, or only down to the table's first entry?"""
        clipped_epsilon: bool = False
        """Compute the direction of a step from the clipped sample, and not from the network's prediction."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.eta <= 1:
                raise SettingError("eta", f"{self.eta} must be in [0, 1]")
            if self.clip is None and self.threshold is None:
                refuse_idle(self, "clip=null and threshold=null", "clipped_epsilon")

    def sampler(self, steps: int) -> "Walk":
        """One walk of `steps` steps."""
        cfg: Any = self.cfg
        inner = _filled(
            self, _diffusers().DDIMScheduler, set_alpha_to_one=cfg.final_alpha_one, **cfg.bounds()
        )
        # Just below 1, since diffusers takes the root of a difference that rounding may leave below 0.
        named = {"eta": min(cfg.eta, 1 - 1e-12), "use_clipped_model_output": cfg.clipped_epsilon}
        noisy = "variance_noise" if cfg.eta else ""
        if not cfg.as_4m:
            times = spaced(steps, self.num_steps, cfg.spacing, cfg.steps_offset)
            return Walk(inner, times, strides=_strides(times), named=named, noisy=noisy)
        check_steps(steps, self.num_steps)
        stride = self.num_steps // steps
        if cfg.spacing == "trailing":
            times = [t - 1 for t in range(self.num_steps, 0, -stride)]
        else:
            times = spaced(steps, self.num_steps, cfg.spacing, cfg.steps_offset)
        return Walk(inner, times, strides=[stride] * len(times), named=named, noisy=noisy)


class PNDM(Table):
    """Diffusion; the sampler extrapolates from the last four predictions. Takes one call more than steps."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SpacingConfig):
        """Settings of `unet/pndm`."""

        schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "shifted_cosine", "sigmoid"] = (
            "scaled_linear"
        )
        """How noise grows with time. The sampler divides by the signal, of which squaredcos_cap_v2 leaves too little at
        its last entries: there it takes spacing=leading."""
        zero_terminal_snr: bool = False
        """Must be false: the sampler divides by the signal of the first entry that it visits."""
        runge_kutta: bool = False
        """Take the first three steps with Runge and Kutta's method, of four calls each."""
        final_alpha_one: bool = True
        """Does the last step remove all noise, or only down to the table's first entry?"""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.ends_in_noise:
                raise SettingError(
                    ("schedule", "zero_terminal_snr"),
                    "unet/pndm divides by the signal, which ends at zero; take zero_terminal_snr=false and another "
                    "schedule than shifted_cosine, or unet/ddim",
                )
            if self.prediction == "sample" and self.as_4m:
                raise SettingError("prediction", "sample: 4M's PNDM takes epsilon or v")

    def sampler(self, steps: int) -> "Walk":
        """One walk of `steps` steps."""
        cfg: Any = self.cfg
        times = spaced(steps, self.num_steps, cfg.spacing, cfg.steps_offset)
        if cfg.runge_kutta and steps < 4:
            raise ConfigError(f"steps={steps}: with runge_kutta, unet/pndm takes at least 4 steps.")

        def convert(prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            # diffusers averages predictions of several times: that is right for epsilon, and wrong for v.
            return epsilon(self, prediction, x_t, t)

        inner = _filled(
            self,
            _diffusers().PNDMScheduler,
            **({} if cfg.as_4m else {"prediction_type": "epsilon"}),
            skip_prk_steps=not cfg.runge_kutta,
            set_alpha_to_one=cfg.final_alpha_one,
            timestep_spacing=cfg.spacing,
            steps_offset=cfg.steps_offset,
        )
        inner.set_timesteps(steps)
        if cfg.as_4m:
            return Walk(inner, [int(t) for t in inner.timesteps])
        signal = float(self.alphas_cumprod[times[0]].sqrt())
        if signal < LEAST_SIGNAL:
            raise ConfigError(
                f"unet/pndm divides by the signal, and at the entry {times[0]} of schedule={cfg.schedule}, where it "
                f"begins, there is {signal:.1g}: take spacing=leading, another schedule, or unet/ddim."
            )
        if cfg.runge_kutta:
            # diffusers takes half of `num_steps // steps` for the middle of every step, whatever its times are.
            first = [one for a, b in pairwise(times[:4]) for one in (a, (a + b) // 2, (a + b) // 2, b)]
            inner.prk_timesteps = np.array(first)
            halves = [
                2 * (a - b) + 1 for a, b in pairwise([*first, times[3]])
            ]  # diffusers halves and rounds down
            return Walk(inner, [*first, *times[3:]], strides=[*halves, *_strides(times[3:])], convert=convert)
        # The second call repeats the first step, from the sample before it, with the mean of two predictions.
        strides = _strides(times)
        if steps > 1:
            times, strides = [*times[:2], *times[1:]], [strides[0], *strides]
        return Walk(inner, times, strides=strides, convert=convert)


class Diffusers(Table):
    """Diffusion; sampling with any scheduler of diffusers that has a table of noise levels."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TableConfig):
        """Settings of `unet/diffusers`."""

        sampler: str = "DPMSolverMultistepScheduler"
        """A class of diffusers: DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler ..."""
        options: dict[str, bool | int | float | str] | None = None
        """Arguments of this class beyond the table and the prediction, such as use_karras_sigmas: true."""

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_class(self.sampler, self.options or {})

    _given: ClassVar[tuple[str, ...]] = ("trained_betas", "num_train_timesteps", "prediction_type")
    _BY_SIGMA: ClassVar = re.compile(r"use_(\w+_sigmas|lu_lambdas)")

    def sampler(self, steps: int) -> "Scaled":
        """One walk of `steps` steps."""
        cfg: Any = self.cfg
        check_steps(steps, self.num_steps)
        cls, bar = getattr(_diffusers(), cfg.sampler), self.alphas_cumprod.double().clone()
        if cfg.ends_in_noise:
            bar[-1] = bar[-2] * LEAST_SHARE
            if any(self._BY_SIGMA.fullmatch(name) for name, value in (cfg.options or {}).items() if value):
                bar.clamp_(min=1 / (1 + MOST_SIGMA**2))
        before = torch.cat([torch.ones(1, dtype=bar.dtype), bar[:-1]])
        # Other defaults than diffusers': begin at the last entry, leave predicted samples as they are.
        ours = {"timestep_spacing": "trailing", "clip_sample": False}
        options = {name: ours[name] for name in ours.keys() & inspect.signature(cls).parameters.keys()}
        try:
            inner = cls(
                num_train_timesteps=self.num_steps,
                trained_betas=(1 - bar / before).tolist(),
                prediction_type=names_of(cfg.prediction),
                **{**options, **(cfg.options or {})},
            )
            inner.set_timesteps(steps)
        except Exception as error:  # each class has its own errors for options and steps that it cannot take
            raise ConfigError(
                f"unet/diffusers: {cfg.sampler} with steps={steps}: {first_line(error)}."
            ) from error
        if not torch.allclose(inner.alphas_cumprod.double(), bar, rtol=0, atol=1e-5):
            raise ConfigError(
                f"unet/diffusers: {cfg.sampler} with these options has other noise levels than the table of training."
            )
        return Scaled(inner, self)


class Walk:
    """A sampler of diffusers with times of our own: `strides` says how far each step goes, else diffusers decides.

    `noisy` is the argument of diffusers' step that brings noise, `convert` makes of a prediction what the sampler
    wants, and `last` is the sampler of the last step where that is another one.
    """

    def __init__(
        self,
        inner: Any,
        times: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        named: dict[str, Any] | None = None,
        noisy: str = "",
        convert: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        last: Any = None,
    ):
        self._convert, self._last = convert, last or inner
        self.timesteps: Sequence[float] = [float(t) for t in times]
        self._inner, self._strides, self._named, self._noisy = inner, strides, named or {}, noisy
        self._done = 0

    def step(
        self,
        prediction: Float[Tensor, "b *s"],
        t: float,
        x_t: Float[Tensor, "b *s"],
        rng: Sequence[torch.Generator],
    ) -> Float[Tensor, "b *s"]:
        """The sample at the next time, fp32."""
        named = dict(self._named)
        if self._noisy == "generator":
            named["generator"] = list(rng) or None  # diffusers takes no empty list
        elif self._noisy:
            named["variance_noise"] = randn(rng, *x_t.shape[1:], device=x_t.device)
        if self._strides is not None:
            # diffusers goes `num_train_timesteps // num_inference_steps` entries down, whatever its times are.
            stride = self._strides[self._done]
            self._inner.num_inference_steps = Fraction(self._inner.config.num_train_timesteps, stride)
        self._done += 1
        inner = self._last if self._done == len(self.timesteps) else self._inner
        if self._convert is not None:
            prediction = self._convert(prediction, x_t, torch.full((len(x_t),), t, device=x_t.device))
        with torch.autocast(x_t.device.type, enabled=False):
            done = inner.step(prediction.float(), int(t), x_t.float(), return_dict=False, **named)
        return done[0]


class Scaled:
    """A sampler of diffusers as it is. Those that scale the network's input get the scaled sample back.

    These go by sigma, noise over signal, which is infinite in pure noise. So the step from there is ours, and exact: to
    the sample that the prediction stands for, with the noise of the next level.
    """

    def __init__(self, inner: Any, table: Table):
        times = [float(t) for t in inner.timesteps]
        self._inner, self._table, self._done = inner, table, 0
        in_noise = table.cfg.ends_in_noise and not table.cfg.as_4m and times[0] == table.num_steps - 1
        self._from_noise = in_noise and float(inner.init_noise_sigma) != 1
        # Of two calls a step, the second one of the first step goes, too, and diffusers begins behind it.
        begin = 2 if self._from_noise and inner.order == 2 else 0
        self._places = [0, *range(max(1, begin), len(times))]
        self.timesteps: Sequence[float] = [times[place] for place in self._places]
        self._noisy = "generator" in inspect.signature(inner.step).parameters
        self._goes = not begin
        if hasattr(inner, "set_begin_index"):  # diffusers looks for the time, which may be there twice
            inner.set_begin_index(begin)

    def step(
        self,
        prediction: Float[Tensor, "b *s"],
        t: float,
        x_t: Float[Tensor, "b *s"],
        rng: Sequence[torch.Generator],
    ) -> Float[Tensor, "b *s"]:
        """The sample at the next time, fp32."""
        prediction, x_t, y = prediction.float(), x_t.float(), x_t
        self._done += 1
        after = self._places[self._done] if self._done < len(self._places) else None
        with torch.autocast(x_t.device.type, enabled=False):
            if self._goes:
                y = self._stepped(prediction, x_t, rng)
                y = y if after is None else y * self._scale(after)
            self._goes = True
            if not self._from_noise:
                return y
            self._from_noise = False
            clean = x_0(self._table, prediction, x_t, torch.full((len(x_t),), t, device=x_t.device))
            return (
                clean
                if after is None
                else (clean + float(self._inner.sigmas[after]) * x_t) * self._scale(after)
            )

    def _stepped(self, prediction: Tensor, x_t: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
        """What diffusers makes of a step, not scaled."""
        place = self._places[self._done - 1]
        named = {"generator": list(rng) or None} if self._noisy else {}
        x_t = x_t / self._scale(place)
        try:
            made = self._inner.step(prediction, self._inner.timesteps[place], x_t, return_dict=False, **named)
        except (ValueError, NotImplementedError, IndexError, AssertionError) as error:
            raise ConfigError(
                f"unet/diffusers: {type(self._inner).__name__}: {first_line(error)}."
            ) from error
        return made[0]

    def _scale(self, place: int) -> float:
        return float(self._inner.scale_model_input(torch.ones(1), self._inner.timesteps[place]))


def _filled(scheduler: Table, cls: Any, **settings: Any) -> Any:
    """A scheduler of diffusers with our table."""
    cfg = scheduler.cfg
    settings = {"prediction_type": names_of(cfg.prediction), **settings}
    inner = cls(num_train_timesteps=cfg.num_steps, **settings)
    inner.alphas_cumprod = scheduler.alphas_cumprod
    if not settings.get("set_alpha_to_one", True):
        inner.final_alpha_cumprod = inner.alphas_cumprod[0]
    return inner


def _strides(times: Sequence[int]) -> list[int]:
    """From each time to the next one, and below the table after the last."""
    return [a - b for a, b in zip(times, [*times[1:], -1])]


@functools.cache
def _diffusers() -> Any:
    """diffusers: its import takes seconds, and training needs none of it."""
    import diffusers

    return diffusers


def _check_class(name: str, options: dict[str, Any]) -> None:
    diffusers = _diffusers()
    known = [one for one in dir(diffusers.schedulers) if one.endswith("Scheduler")]
    if name not in known:
        raise SettingError("sampler", f"{name} is not a scheduler of diffusers.{did_you_mean(name, known)}")
    try:
        parameters = inspect.signature(getattr(diffusers, name)).parameters
    except Exception as error:  # a class whose own dependency is missing raises at its first use
        raise SettingError("sampler", f"{name} cannot be used here: {first_line(error)}") from error
    if not all(wanted in parameters for wanted in Diffusers._given):
        raise SettingError(
            "sampler", f"{name} takes no table of noise levels; for rectified flow there is unet/flow"
        )
    if list(inspect.signature(getattr(diffusers, name).step).parameters)[1:4] != list(STEP):
        raise SettingError("sampler", f"{name}.step needs more than {', '.join(STEP)}")
    if "Inverse" in name:
        raise SettingError("sampler", f"{name} goes from samples to noise")
    for option in options:
        if option not in parameters or option in Diffusers._given:
            raise SettingError(
                ("options",), f"{option} is not an option of {name}.{did_you_mean(option, parameters)}"
            )
        if option.startswith("beta_") or "flow" in option:
            raise SettingError(
                ("options",),
                f"{option}: noise levels are those of the table; set schedule, beta_start and beta_end beside sampler"
                + ("" if option.startswith("beta_") else ", and for rectified flow take unet/flow"),
            )
