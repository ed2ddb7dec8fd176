"""Masks beside the files of a pass: which positions of each sample are valid."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from vqcore.compose.build import component
from vqcore.config import portable, to_tree
from vqcore.data.listing import Listing
from vqcore.data.reader import Opened, check_masks, opened
from vqcore.errors import ConfigError, DataError, SettingError, listed
from vqcore.files import local
from vqcore.protocols import Modality, is_mask
from vqcore.registry import registry
from vqcore.tokens.inputs import prefixed


class Masks:
    """The masks of a folder, by the key of their sample. `given` is `FOLDER`, or `mask[key=value]:FOLDER`.

    `said` is what a manifest says of them. Raises `ConfigError` for settings that do not fit the modality of samples.
    """

    def __init__(self, given: str, modality: Modality):
        node, path = prefixed(given, "modality") or ({"name": "mask"}, given)
        cfg: Any = component("modality", node, file=f"--masks {given}", where="")
        try:
            self.modality = registry().build("modality", cfg, "--masks", size=modality.spec.size)
        except SettingError as error:
            raise ConfigError(f"--masks {given}: {error}.") from error
        if not is_mask(self.modality):
            raise ConfigError(f"--masks {given}: {cfg.name} is no modality of masks. Take mask.")
        self.given, self.files = given, Listing(str(local(path)), self.modality.suffixes, "--masks")
        digest = hashlib.sha256()
        for index in range(len(self.files)):
            digest.update(os.fsencode(self.files.key(index)) + b"\0%d\0" % self.files.bytes_of(index))
        self.said: Mapping[str, Any] = {"settings": to_tree(portable(cfg)), "sha256": digest.hexdigest()}

    def check(self, modality: Modality, keys: Iterable[str]) -> None:
        """Raise `ConfigError` if the masks do not fit a modality, `DataError` if samples have none."""
        try:
            check_masks(modality, {"mask": self.modality}, "")
        except ConfigError as error:
            raise ConfigError(f"--masks {self.given}: {error}") from error
        asked = list(keys)
        if missing := [key for key in asked if self.files.find(key) is None]:
            raise DataError(
                f"--masks {self.given}: {len(missing)} of {len(asked)} samples have no mask ({listed(missing, 3)})."
            )

    def of(self, key: str) -> Opened:
        """The mask of a sample, read. Raises `DataError`."""
        index = self.files.find(key)
        if index is None:
            raise DataError(f"--masks {self.given} has no mask of '{key}'")
        return opened(self.modality, self.files.path(index))
