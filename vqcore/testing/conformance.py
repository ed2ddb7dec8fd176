"""Test classes for plugin authors: subclass one, name component and configs, and pytest runs the laws.

class TestJointRVQ(QuantizerConformance):
    component = "pose/joint-rvq"
    configs = ({}, {"levels": 3})
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vqcore.config import Config, from_tree, slot
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.rng import generator
from vqcore.testing import checks


def build(kind: str, name: str, settings: Mapping[str, Any], **wiring: Any) -> Any:
    """A component by name, its settings checked as in a config file."""
    schema = dataclasses.make_dataclass("One", [("part", Config, slot(kind))], frozen=True, kw_only=True)
    cfg: Any = from_tree({"part": {"name": name, **settings}}, schema=schema, file="conformance")
    return registry().build(kind, cfg.part, **wiring)


class ComponentConformance:
    """What holds for every component. `configs` are the settings to test with."""

    kind: ClassVar[str]
    component: ClassVar[str]
    configs: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def test_manifest(self) -> None:
        """The manifest is light."""
        found = registry().find(self.kind, self.component)
        checks.check_manifest(found.origin.module, (found.component.target,))

    def test_settings(self) -> None:
        """The settings are a documented dataclass."""
        checks.check_config(registry().load(self.kind, self.component))


class QuantizerConformance(ComponentConformance):
    """The laws of a quantizer; `waived` maps a law it does not claim to the reason."""

    kind = "quantizer"
    waived: ClassVar[Mapping[str, str]] = {}

    def test_laws(self) -> None:
        """Inverse, range, batch and position independence, gradients, masks, state."""
        for settings in self.configs:
            torch.manual_seed(0)
            checks.check_quantizer(build(self.kind, self.component, settings), waived=self.waived)


class EncoderConformance(ComponentConformance):
    """The laws of an encoder; `spec` is the input it is tried on."""

    kind = "encoder"
    spec: ClassVar[DataSpec]

    def test_laws(self) -> None:
        """Shapes, determinism, batch independence."""
        for settings in self.configs:
            encoder = build(self.kind, self.component, settings, spec=self.spec)
            x = torch.randn(3, self.spec.channels, *self.spec.size, generator=generator(0, "check"))
            checks.check_encoder(encoder, x)


class DecoderConformance(ComponentConformance):
    """The laws of a plain decoder; `grid` is a grid whose output has the size of `spec`."""

    kind = "decoder"
    spec: ClassVar[DataSpec]
    grid: ClassVar[tuple[int, ...]]
    dim: ClassVar[int] = 8

    def test_laws(self) -> None:
        """Shapes, batch independence, gradient at the last layer."""
        for settings in self.configs:
            decoder = build(self.kind, self.component, settings, dim=self.dim, spec=self.spec)
            z_q = torch.randn(3, *self.grid, self.dim, generator=generator(0, "check"))
            checks.check_decoder(decoder, z_q, (3, self.spec.out_channels, *self.spec.size))


class ModalityConformance(ComponentConformance):
    """The laws of a modality; `source` returns something its `read` takes, `size` is the nominal size."""

    kind = "modality"
    size: ClassVar[tuple[int, ...] | None] = None

    def source(self) -> Any:
        """One sample: a path, or an object in memory."""
        raise NotImplementedError

    def test_laws(self) -> None:
        """Extent, shape, range, a fixed view for evaluation."""
        for settings in self.configs:
            checks.check_modality(build(self.kind, self.component, settings, size=self.size), self.source())
