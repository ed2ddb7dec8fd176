"""The adversary and its discriminators: laws, closed forms, balance, whole runs."""

import logging

import pytest
import torch
from torch.nn import functional as F
from vqcore_percept.augment import augmented
from vqcore_percept.gan import Gan, for_discriminator, for_generator, lecam

from vqcore.errors import ConfigError
from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.rng import generator
from vqcore.testing.conformance import AdversaryConformance, DiscriminatorConformance


def data(*size, channels=3):
    return DataSpec(channels=channels, size=size, range=(-1.0, 1.0))


PATCH = {"name": "percept/patchgan", "width": 4, "depth": 1}


class TestPatchGANLaws(DiscriminatorConformance):
    component = "percept/patchgan"
    spec = data(16, 16)
    configs = (
        {"width": 4, "depth": 2},
        {"width": 4, "depth": 1, "norm": "batch"},
        {"width": 4, "norm": "none", "depth": 1},
    )


class TestPatchGANOfWavesLaws(DiscriminatorConformance):
    component = "percept/patchgan"
    spec = data(32, channels=2)
    configs = ({"width": 4, "depth": 2},)


class TestPatchGANOfVolumesLaws(DiscriminatorConformance):
    component = "percept/patchgan"
    spec = data(8, 8, 8, channels=1)
    configs = ({"width": 4, "depth": 1},)


class TestGanLaws(AdversaryConformance):
    component = "percept/gan"
    spec = data(16, 16)
    configs = (
        {"discriminator": PATCH},
        {"discriminator": PATCH, "loss": "non-saturating", "lecam": True, "r1": True, "weight": "adaptive"},
        {"discriminator": PATCH, "loss": "vanilla", "augment": ["colour", "translation", "cutout"]},
    )
