"""Schedulers whose samplers are those of diffusers, with right times where diffusers 0.42 errs.

Papers: DDPM (arXiv 2006.11239), DDIM (arXiv 2010.02502), PNDM (arXiv 2202.09778), dynamic thresholding (arXiv
2205.11487, section 2.3). `docs/diffusion.md` lists what diffusers and 4M do otherwise.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vqcore.config import at_least
from vqcore.diffusion import epsilon
from vqcore.errors import ConfigError, SettingError, did_you_mean, first_line
from vqcore.rng import randn
from vqcore_unet.table import Table, TableConfig, check_steps, names_of, spaced

LEAST_SHARE = 1e-6
"""Zero SNR has no logarithm: for samplers that need one, the last alpha_bar is this share of the last but one."""

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
        """How noise grows with time. The sampler divides by the signal: squaredcos_cap_v2 leaves too little of it."""
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
        check_steps(steps, self.num_steps)
        if cfg.runge_kutta and steps < 4:
            raise ConfigError(f"steps={steps}: with runge_kutta, unet/pndm takes at least 4 steps.")
        # diffusers averages predictions of several times: that is right for epsilon, and wrong for v.
        convert = None if cfg.as_4m else lambda prediction, x_t, t: epsilon(self, prediction, x_t, t)
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
        times = [int(t) for t in inner.timesteps]
        if cfg.as_4m or steps == 1:
            return Walk(inner, times, convert=convert)
        if cfg.runge_kutta:
            first = len(inner.prk_timesteps)
            strides = [self.num_steps // steps] * first + _strides(times[first:])
            return Walk(inner, times, strides=strides, convert=convert)
        # The second call repeats the first step, from the sample before it, with the mean of two predictions.
        once = [times[0], *times[2:]]
        strides = _strides(once)
        return Walk(inner, times, strides=[strides[0], *strides], convert=convert)


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

    def sampler(self, steps: int) -> "Scaled":
        """One walk of `steps` steps."""
        cfg: Any = self.cfg
        check_steps(steps, self.num_steps)
        cls, bar = getattr(_diffusers(), cfg.sampler), self.alphas_cumprod.double()
        if cfg.ends_in_noise:
            bar[-1] = bar[-2] * LEAST_SHARE
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
        except (ValueError, NotImplementedError, TypeError) as error:
            raise ConfigError(
                f"unet/diffusers: {cfg.sampler} with steps={steps}: {first_line(error)}."
            ) from error
        sampler = Scaled(inner)
        if any(not a >= b for a, b in pairwise(sampler.timesteps)):
            raise ConfigError(
                f"unet/diffusers: {cfg.sampler}: its times do not fall from noise to the sample."
            )
        return sampler


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
            named["generator"] = list(rng)
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
    """A sampler of diffusers as it is. Those that scale the network's input get the scaled sample back."""

    def __init__(self, inner: Any):
        self._inner, self._done = inner, 0
        self.timesteps: Sequence[float] = [float(t) for t in inner.timesteps]
        self._noisy = "generator" in inspect.signature(inner.step).parameters

    def step(
        self,
        prediction: Float[Tensor, "b *s"],
        t: float,
        x_t: Float[Tensor, "b *s"],
        rng: Sequence[torch.Generator],
    ) -> Float[Tensor, "b *s"]:
        """The sample at the next time, fp32."""
        times = self._inner.timesteps
        with torch.autocast(x_t.device.type, enabled=False):
            scale = self._scale(times[self._done])
            named = {"generator": list(rng)} if self._noisy else {}
            try:
                y = self._inner.step(
                    prediction.float(), times[self._done], x_t.float() / scale, return_dict=False, **named
                )[0]
            except (ValueError, NotImplementedError) as error:
                raise ConfigError(
                    f"unet/diffusers: {type(self._inner).__name__}: {first_line(error)}."
                ) from error
        self._done += 1
        return y * self._scale(times[self._done]) if self._done < len(times) else y

    def _scale(self, t: Tensor) -> float:
        return float(self._inner.scale_model_input(torch.ones(1), t))


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
    for option in options:
        if option not in parameters or option in Diffusers._given:
            raise SettingError(
                ("options",), f"{option} is not an option of {name}.{did_you_mean(option, parameters)}"
            )
