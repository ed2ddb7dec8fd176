"""Test classes for plugin authors: subclass one, name the component and its configs, and pytest checks the laws.

class TestJointRVQ(QuantizerConformance):
    component = "pose/joint-rvq"
    configs = ({}, {"levels": 3})
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqcore.compose.build import component, from_tree
from vqcore.protocols import Batch, Coded, DataSpec, learner
from vqcore.registry import registry
from vqcore.rng import generator
from vqcore.schema import TokenizerConfig
from vqcore.testing import checks
from vqcore.testing.basics import noise
from vqcore.testing.runs import as_run
from vqcore.testing.samples import metric_batches
from vqcore.tokenizer import Tokenizer


def configured(kind: str, name: str, settings: Mapping[str, Any]) -> Any:
    """A component's config from plain data, checked like a config file."""
    return component(kind, {"name": name, **settings}, file="conformance", where="part")


def build(kind: str, name: str, settings: Mapping[str, Any], seed: int = 0, **wiring: Any) -> Any:
    """A component by name. The settings are checked like a config file; the seed decides the weights."""
    torch.manual_seed(seed)
    return registry().build(kind, configured(kind, name, settings), **wiring)


class ComponentConformance:
    """The laws of every component. `configs` are the settings to test with."""

    kind: ClassVar[str]
    component: ClassVar[str]
    configs: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    waived: ClassVar[Mapping[str, str]] = {}

    def test_manifest(self) -> None:
        """The manifest is light."""
        found = registry().find(self.kind, self.component)
        checks.check_manifest(found.origin.module, (found.component.target,))

    def test_settings(self) -> None:
        """The settings are a documented dataclass."""
        checks.check_config(registry().load(self.kind, self.component))


class QuantizerConformance(ComponentConformance):
    """The laws of a quantizer; `waived` maps a law that the quantizer does not follow to the reason."""

    kind = "quantizer"

    def test_laws(self) -> None:
        """Inverse, range, batch and position independence, gradients, masks, bfloat16, state."""
        for settings in self.configs:
            checks.check_quantizer(build(self.kind, self.component, settings), waived=self.waived)


class EncoderConformance(ComponentConformance):
    """The laws of an encoder, for inputs of `spec`."""

    kind = "encoder"
    spec: ClassVar[DataSpec]

    def test_laws(self) -> None:
        """Shapes, determinism, batch independence, refused sizes, gradients, bfloat16, state."""
        for settings in self.configs:
            encoder, fresh = (
                build(self.kind, self.component, settings, seed, spec=self.spec) for seed in (0, 1)
            )
            checks.check_encoder(encoder, noise(3, self.spec.channels, *self.spec.size), fresh=fresh)


class DecoderConformance(ComponentConformance):
    """The laws of a plain decoder; `grid` is a grid whose output has the size of `spec`."""

    kind = "decoder"
    spec: ClassVar[DataSpec]
    grid: ClassVar[tuple[int, ...]]
    dim: ClassVar[int] = 8

    def test_laws(self) -> None:
        """Shapes, batch independence, gradients, bfloat16, state."""
        for settings in self.configs:
            decoder, fresh = (
                build(self.kind, self.component, settings, seed, dim=self.dim, spec=self.spec)
                for seed in (0, 1)
            )
            shape = (3, self.spec.out_channels, *self.spec.size)
            checks.check_decoder(decoder, noise(3, *self.grid, self.dim), shape, fresh=fresh)


class DenoiserConformance(ComponentConformance):
    """The laws of a denoiser; attributes as for a decoder; `times` are two noise levels."""

    kind = "decoder"
    spec: ClassVar[DataSpec]
    grid: ClassVar[tuple[int, ...]]
    dim: ClassVar[int] = 8
    times: ClassVar[tuple[float, float]] = (1.0, 500.0)

    def test_laws(self) -> None:
        """Target space, shapes, hidden tokens, batch independence, gradients, bfloat16, state."""
        for settings in self.configs:
            denoiser, fresh = (
                build(self.kind, self.component, settings, seed, dim=self.dim, spec=self.spec)
                for seed in (0, 1)
            )
            shape, z_q = (3, self.spec.channels, *self.spec.size), noise(3, *self.grid, self.dim)
            checks.check_denoiser(denoiser, z_q, shape, times=self.times, fresh=fresh)


class PerceptConformance(ComponentConformance):
    """The laws of a perceptual loss on samples of `spec`."""

    kind = "percept"
    spec: ClassVar[DataSpec]

    def test_laws(self) -> None:
        """Zero for equal samples, above zero for others, sample by sample, frozen, a gradient at x_hat."""
        for settings in self.configs:
            percept = build(self.kind, self.component, settings, spec=self.spec)
            checks.check_percept(percept, *_two(self.spec))


class DiscriminatorConformance(ComponentConformance):
    """The laws of a discriminator on samples of `spec`."""

    kind = "discriminator"
    spec: ClassVar[DataSpec]

    def test_laws(self) -> None:
        """Shapes, determinism, batch independence in eval mode, gradients to x and to all parameters."""
        for settings in self.configs:
            made, fresh = (
                build(self.kind, self.component, settings, seed, spec=self.spec) for seed in (0, 1)
            )
            checks.check_discriminator(made, _two(self.spec)[0], fresh=fresh)


class AdversaryConformance(ComponentConformance):
    """The laws of an adversary on samples of `spec`."""

    kind = "adversary"
    spec: ClassVar[DataSpec]

    def test_laws(self) -> None:
        """Names, determinism, gradients to x_hat and to all parameters, state."""
        for settings in self.configs:
            made, fresh = (
                build(self.kind, self.component, settings, seed, spec=self.spec) for seed in (0, 1)
            )
            checks.check_adversary(made, *_two(self.spec), fresh=fresh)


class TeacherConformance(ComponentConformance):
    """The laws of a frozen feature network on samples of `spec`."""

    kind = "teacher"
    spec: ClassVar[DataSpec]

    def test_laws(self) -> None:
        """Frozen, deterministic even in training mode, sample by sample."""
        for settings in self.configs:
            teacher = build(self.kind, self.component, settings, spec=self.spec)
            checks.check_teacher(teacher, _two(self.spec)[0])


class SchedulerConformance(ComponentConformance):
    """The laws of a scheduler; a walk of `steps` steps with perfect predictions ends at x, up to `tolerance`."""

    kind = "scheduler"
    steps: ClassVar[int] = 10
    tolerance: ClassVar[float] = 0.05

    def test_laws(self) -> None:
        """Pure, noisier with t, reproducible, sample by sample; the walk ends at x."""
        for settings in self.configs:
            scheduler = build(self.kind, self.component, settings)
            checks.check_scheduler(scheduler, steps=self.steps, tolerance=self.tolerance, waived=self.waived)


class ObjectiveConformance(ComponentConformance):
    """The laws of an objective; `tokenizer` is the config of the tokenizer to train: modality, size and model."""

    kind = "objective"
    tokenizer: ClassVar[Mapping[str, Any]]

    def extras(self) -> Mapping[str, Any]:
        """The extra modalities of the batch of three samples; none by default."""
        return {}

    def test_laws(self) -> None:
        """Players, names of losses, gradients to all parameters, one source of randomness, decoding."""
        for settings in self.configs:
            tree = {**self.tokenizer, "objective": {"name": self.component, **settings}}
            made = Tokenizer(from_tree(tree, schema=TokenizerConfig, file="conformance"))
            x = metric_batches(dataclasses.replace(made.spec, size=tuple(made.cfg.size)))[0][:3]
            batch = Batch(x, ("a", "b", "c"), extras=self.extras())
            checks.check_objective(made.objective, made, batch, waived=self.waived)


class ModalityConformance(ComponentConformance):
    """The laws of a modality; `source` returns something that `read` takes, `size` is the nominal size.

    `tolerance` is the largest change of a value by `show` and `read`, as a share of 1 or of the largest value.
    """

    kind = "modality"
    size: ClassVar[tuple[int, ...] | None] = None
    tolerance: ClassVar[float] = 0.02

    def source(self) -> Any:
        """One sample: a path, or an object in memory."""
        raise NotImplementedError

    def test_laws(self) -> None:
        """Views, shapes, ranges, masks, the round trip through show and read, mirroring, damaged files."""
        for settings in self.configs:
            modality = build(self.kind, self.component, settings, size=self.size)
            checks.check_modality(modality, self.source(), tolerance=self.tolerance, waived=self.waived)


class DataConformance(ComponentConformance):
    """The laws of a data source; `modality` is the main modality's node, `size` its nominal size."""

    kind = "data"
    modality: ClassVar[Mapping[str, Any]]
    size: ClassVar[tuple[int, ...] | None] = None

    def settings(self, folder: Path) -> Mapping[str, Any]:
        """Settings in addition to `configs`. A source that reads files writes its samples into `folder` here."""
        return {}

    def test_laws(self, tmp_path: Path) -> None:
        """Keys, order, pickling, readable samples; in both splits if there are two."""
        for number, chosen in enumerate(self.configs):
            folder = tmp_path / str(number)
            folder.mkdir()
            tree = {"modality": dict(self.modality), **self.settings(folder), **chosen}
            cfg = configured(self.kind, self.component, tree)
            modality = registry().build("modality", cfg.modality, size=self.size)
            extra = {
                label: registry().build("modality", one, size=self.size) for label, one in cfg.extra.items()
            }
            for split in ("train", "eval") if cfg.has_eval else ("train",):
                data = registry().build("data", cfg, split=split, modality=modality, extra=extra)
                checks.check_data(data, modality, extra)


class ReaderConformance(ComponentConformance):
    """The laws of a reader of files; `sample` writes a small file that it reads."""

    kind = "reader"

    def sample(self, folder: Path) -> Path:
        """Write a small file into a folder; returns the path."""
        raise NotImplementedError

    def test_laws(self, tmp_path: Path) -> None:
        """Numbers, the same at every reading; damaged and missing files are refused."""
        for settings in self.configs:
            checks.check_reader(build(self.kind, self.component, settings), self.sample(tmp_path))


class StoreConformance(ComponentConformance):
    """The laws of a store of codes; `given` as in `check_store`, for a layout of another system."""

    kind = "store"
    given: ClassVar[Sequence[tuple[Mapping[str, Any], Sequence[Sequence[Coded]]]]] = ()

    def test_laws(self) -> None:
        """What was added comes back in order, by place and by key; other folders are refused."""
        for settings in self.configs:
            made = build(self.kind, self.component, settings)
            checks.check_store(made, given=self.given, waived=self.waived)


class TextConformance(ComponentConformance):
    """The laws of a text tokenizer on `texts`."""

    kind = "text"
    texts: ClassVar[tuple[str, ...]] = ("a cat", "", "two cats on a mat")

    def test_laws(self) -> None:
        """Ids in range, text by text; decoded texts have the same ids."""
        for settings in self.configs:
            checks.check_text(build(self.kind, self.component, settings), self.texts, waived=self.waived)

    def test_learns(self) -> None:
        """If it learns its vocabulary: equal texts give equal bytes, which give equal ids."""
        for settings in self.configs:
            if learner(build(self.kind, self.component, settings)):
                checks.check_learning(partial(self._with_file, settings), self.texts)

    def _with_file(self, settings: Mapping[str, Any], file: str | None) -> Any:
        return build(self.kind, self.component, {**settings, "file": file})


class MetricConformance(ComponentConformance):
    """The laws of a metric for data of `spec`."""

    kind = "metric"
    spec: ClassVar[DataSpec]

    def test_laws(self) -> None:
        """Sums in any split of the samples, values, the better direction, masks."""
        for settings in self.configs:
            checks.check_metric(
                build(self.kind, self.component, settings, spec=self.spec), self.spec, waived=self.waived
            )


class HookConformance(ComponentConformance):
    """The laws of a hook; `run` is the config of a tiny run, without `hooks` and without `run.dir`."""

    kind = "hook"
    run: ClassVar[Mapping[str, Any]]

    def test_names(self) -> None:
        """The hook has known methods with known arguments."""
        checks.check_hook(registry().load(self.kind, self.component))

    def test_observes(self, tmp_path: Path) -> None:
        """A run ends with the same weights with the hook and without it, and the hook raises nothing."""
        tree = {**self.run, "run": {**self.run["run"], "dir": str(tmp_path / "run")}}
        for settings in self.configs:
            checks.check_observer(as_run(tree), {"watched": configured(self.kind, self.component, settings)})


class FormatConformance(ComponentConformance):
    """The laws of a foreign format; `sample` writes a small file or folder that it reads.

    A format that reads tokenizers and training configs writes a training config in `config_sample`.
    """

    kind = "format"

    def sample(self, folder: Path) -> Path:
        """Write a small example into a folder; returns the path."""
        raise NotImplementedError

    def config_sample(self, folder: Path) -> Path | None:
        """Write a small training config into a folder; returns the path."""
        return None

    def test_laws(self, tmp_path: Path) -> None:
        """Recognised by name, deterministic, fills exactly, reads what it writes, refuses pickles and damaged files."""
        for number, settings in enumerate(self.configs):
            folder = tmp_path / str(number)
            folder.mkdir()
            made = build(self.kind, self.component, settings)
            checks.check_format(made, self.sample(folder), config=self.config_sample(folder))


def _two(spec: DataSpec) -> tuple[Tensor, Tensor]:
    """Two batches of two samples each, with values in the range of the spec."""
    low, high = spec.range or (-1.0, 1.0)
    shape = (2, spec.channels, *spec.size)
    first, second = (torch.rand(shape, generator=generator(seed, "check")) for seed in (0, 1))
    return first * (high - low) + low, second * (high - low) + low
