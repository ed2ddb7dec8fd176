"""A config for somebody's files in the manner of a published tokenizer: `vqcore new config --like PLUGIN/NAME FOLDER`.

The family (`protocols.KnowsFamilies`) gives architecture, quantizer, losses and schedule. The files give place, split,
channels, names and statistics, and a size that they have. A config that cannot be built is never written.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqcore.assembly import check_size, tokenizer_config
from vqcore.check.draft import Ask, Draft, by, draft, made, places, shapes_text
from vqcore.compose.build import component, from_tree
from vqcore.compose.describe import annotated, inline
from vqcore.data.listing import Listing
from vqcore.data.sizes import sizes
from vqcore.errors import ConfigError, DataError, VqcoreError, did_you_mean, first_line, listed
from vqcore.protocols import DataSpec, ForeignConfig, Modality, finishes, knows_families
from vqcore.registry import registry
from vqcore.schema import RunConfig, TokenizerConfig
from vqcore.tokenizer import Tokenizer

PROCESSES = 8
"""Of these many processes a comment speaks, as the recipes in cfgs/ do."""
FEW = 2000
"""Fewer training steps than this are too few to end with a good tokenizer."""
CHANGES = ("hflip", "min_crop_scale")
"""How training samples are changed: from the family, for files of any kind."""
FILES = 12
"""Files that the family's own modality reads."""
IDS = 2**16
"""More than the ids that pictures hold."""
NOTHING = 255
"""The id that usually stands for no class."""
ORDER = ("data", "model", "objective", "run", "optim", "ema", "eval", "hooks")


def family(name: str) -> ForeignConfig:
    """The training config of a family, `PLUGIN/NAME`. Raises `ConfigError` if there is none of this name."""
    id, slash, rest = name.partition("/")
    found = {each.origin.id for each in registry().components("format")}
    for format_ in _formats(id) if slash and id in found else ():
        try:
            return format_.like(rest)
        except ConfigError as error:
            raise ConfigError(f"--like {name}: {error}") from error
    names = [
        f"{each}/{one}" for each in sorted(found) for format_ in _formats(each) for one in format_.families
    ]
    if not names:
        raise ConfigError("--like: no installed plugin knows families; vqcore-fourm and vqcore-terramind do")
    near = did_you_mean(name, names)
    what = f"--like {name}: there is no such family." if name else "--like needs a family."
    raise ConfigError(f"{what}{near or f' There are: {listed(names, 40)}'}")


def _formats(id: str) -> list[Any]:
    """The formats of a plugin that know families."""
    made = []
    for found in registry().components("format"):
        if found.origin.id == id and knows_families(registry().load("format", found.name)):
            made.append(registry().build("format", component("format", {"name": found.name}, file="--like")))
    return made


def like(name: str, folder: Path, answers: dict[str, Any], ask: Ask) -> str:
    """The text of a config like the family `name` for the files in `folder`.

    Raises `ConfigError` for a family that does not exist or does not fit the files, and `DataError` for files that
    cannot be read.
    """
    joined = _Joined(name, family(name), answers)
    answers = {**joined.known, **answers}
    found = draft(folder, answers, ask, joined.own)
    tree = joined.tree(found)
    joined.check(tree, folder)
    head = [
        f"# Drafted by `vqcore new config --like {name} {folder}`. Lines with 'please check' are guesses.",
        f"# vqcore check THIS    torchrun --nproc_per_node={PROCESSES} -m vqcore train THIS",
    ]
    return "\n".join(head) + "\n" + annotated(tree, joined.notes, joined.given.remarks)


class _Joined:
    """A family and somebody's files become one config. `notes` are its comments by key."""

    def __init__(self, name: str, given: ForeignConfig, answers: Mapping[str, Any]):
        self.name, self.given, self.answers = name, given, answers
        self.data = dict(given.tree["data"])
        self.node: dict[str, Any] = self.data.pop("modality")
        self.step: int = self.data.pop("resolution_step", 1)
        self.side: int | None = self.data.get("input_size", self.data.get("input_size_max"))
        self.notes = dict(given.notes)
        self.refused = ""
        self.modality: Any = None
        # What arrays are is seen from their shapes, where the family does not say it.
        self.known = (
            {"vector": True} if self.side is None else {"channels_last": False} if self.step == 1 else {}
        )

    def own(self, path: Path) -> Draft | None:
        """The files as the family's modality reads them, or the one that the answers name. None: look at them."""
        said = self.answers.get("modality")
        node = self.node if said in (None, self.node["name"]) else {"name": said}
        if (
            node["name"] == "array"
            or str(said).startswith("audio/")
            or {"reader", "kind"} & self.answers.keys()
        ):
            return None
        size = (1,) if self.side is None else (self.side, self.side)
        notes: dict[str, str] = {}
        try:
            node = _labelled(node, path, size, notes)
            modality: Modality = made("modality", node, size=size)
            files = _listing(modality, path)
            extents = _extents(modality, files)
        except (VqcoreError, OSError) as error:
            if said is not None:
                raise ConfigError(
                    f"modality={said}: these files are none of its: {first_line(error)}"
                ) from error
            self.refused = first_line(error)
            return None
        self.modality = modality
        extents = [] if finishes(modality) else extents
        vector = self.side is None
        return Draft(node, size, size, 0, files, notes, vector=vector, extents=extents)

    def tree(self, found: Draft) -> dict[str, Any]:
        """The config. Raises `ConfigError` where the family does not fit what was found."""
        tree: dict[str, Any] = {key: dict(node) for key, node in self.given.tree.items()}
        node = self._modality(found)
        if self.modality is None:
            self.modality = made("modality", node, size=found.size)
            if node["name"] == "rgb":
                found.extents = _extents(self.modality, found.files)
        spec = self.modality.spec
        self._refuse_others(found, spec, tree["objective"].get("loss"))
        sides = self._sides(found)
        kept = {key: value for key, value in self.data.items() if not key.startswith("input_size")}
        tree["data"] = {"name": "folder", **found.data, "modality": node, **self._sizes(sides), **kept}
        for where, keys in (("data", found.data), ("data.modality", node)):
            self.notes |= {f"{where}.{key}": found.notes[key] for key in keys if key in found.notes}
        if sides is not None and sides != (self.side,) * len(sides):
            tree.get("eval", {}).pop("sizes", None)
            for part, key in (("encoder", "input_size_enc"), ("decoder", "input_size_dec")):
                if tree["model"][part].get(key, 0) > max(sides):
                    tree["model"][part] = {k: v for k, v in tree["model"][part].items() if k != key}
        scheduler = tree["objective"].get("scheduler", {})
        if "clip" in scheduler and (spec.range is None or max(map(abs, spec.range)) > 1):
            tree["objective"]["scheduler"] = {key: value for key, value in scheduler.items() if key != "clip"}
            self.notes["objective.scheduler"] = (
                f"Not clipped: the values of these files go beyond -1 to 1, where {self.name} ends (clip: 1)."
            )
        if node["name"] != self.node["name"]:
            tree["objective"] = self._judged(tree["objective"], spec)
        self._schedule(tree, found)
        if any(one.name == "track/report" for one in registry().components("hook")):
            tree["hooks"] = {"report": {"name": "track/report"}}
        return {key: tree[key] for key in ORDER if tree.get(key)}

    def check(self, tree: Mapping[str, Any], folder: Path) -> None:
        """Build the tokenizer, as a rule without values. Raises `ConfigError` if the parts do not fit each other."""
        try:
            config = from_tree(
                {**tree, "run": {"dir": "-", **tree["run"]}}, schema=RunConfig, file="the config"
            )
            tokenizer = _built(tokenizer_config(config, self.modality))
            for each in sizes(config.data, tokenizer.spec):
                check_size(tokenizer, each)
        except (VqcoreError, ValueError) as error:
            text = f"--like {self.name} does not fit the files in {folder}: {first_line(error)}"
            raise ConfigError(text) from error

    def _modality(self, found: Draft) -> dict[str, Any]:
        """The modality of the config: what the files need, and how the family changes training samples."""
        left = (*CHANGES, "ratio", *(() if found.vector else ("size",)))
        node = {key: value for key, value in found.modality.items() if key not in left}
        if node["name"] == self.node["name"] != "array":
            return found.modality
        own = component("modality", self.node, file=self.name)
        known = {each.name for each in dataclasses.fields(component("modality", node, file="the files"))}
        if len(found.size) == 2:
            node |= {key: getattr(own, key) for key in CHANGES if key in known and hasattr(own, key)}
        if node.get("hflip"):
            found.notes["hflip"] = "as in the family; 0 where left and right are not alike"
        if own.name != node["name"]:
            guess = "" if "modality" in self.answers else "please check: "
            why = f", which does not read these: {self.refused}" if self.refused else ""
            self.notes.pop("objective.scheduler", None)
            self.notes["data.modality"] = (
                f"{guess}{found.notes.get('modality', 'as you said')}; the family has {own.name}{why}"
            )
        names = self.node.get("channels")
        if isinstance(names, list) and node.get("channels") == len(names):
            found.notes["channels"] += f". Those of the family have names: {inline(names)}"
        return node

    def _refuse_others(self, found: Draft, spec: DataSpec, loss: str | None) -> None:
        """Raise `ConfigError` for files of another rank, or classes where the family has quantities."""
        what = found.modality["name"]
        if (self.side is None) != found.vector or not (found.vector or spec.rank == 2):
            here = (
                "one vector a sample" if found.vector else f"{spec.rank} ax{'i' if spec.rank == 1 else 'e'}s"
            )
            wants = "one vector a sample" if self.side is None else "2 axes"
            raise ConfigError(
                f"--like {self.name}: this family has {wants}, and these files have {here} ({what})."
            )
        if loss and (loss == "cross_entropy") != (spec.kind == "categorical"):
            wants = "class maps" if loss == "cross_entropy" else "quantities"
            here = (
                "class maps: say kind=continuous if they are none"
                if spec.kind == "categorical"
                else "quantities"
            )
            why = f" {self.node['name']} does not read them: {self.refused}." if self.refused else ""
            hint = " If they are, name their modality: modality=vision/semseg." if what == "rgb" else ""
            raise ConfigError(
                f"--like {self.name}: this family is for {wants}, and these files hold {here}.{why or hint}"
            )

    def _sides(self, found: Draft) -> tuple[int, ...] | None:
        """The largest training size: the family's, or what the files have if that is less. None for vectors.

        Positions of feature maps (a step of 1) are not resized.
        """
        if self.side is None:
            return None
        extents = found.extents or ([found.size] if found.notes else [])
        if not extents:
            return (self.side, self.side)
        has = [int(np.quantile([extent[axis] for extent in extents], 0.05)) for axis in range(2)]
        ranged = "input_size_min" in self.data
        most = max(has) if self.step == 1 and not ranged else self.side
        sides = tuple(min(most, side // self.step * self.step) for side in has)
        if not all(sides):
            raise ConfigError(
                f"--like {self.name}: sizes of this family are multiples of {self.step}, and files have {by(has)}."
            )
        if sides != (self.side,) * 2:
            who = "files" if found.extents else "samples"
            said = f"please check: the {who} have {shapes_text(extents)}; the family has {self.side}"
            self.notes["data.input_size"] = said
        return sides

    def _sizes(self, sides: tuple[int, ...] | None) -> dict[str, Any]:
        """`data`'s settings of sizes."""
        if sides is None:
            return {}
        low = self.data.get("input_size_min")
        if low is None or min(sides) <= low or len(set(sides)) > 1:
            return {"input_size": sides[0] if len(set(sides)) == 1 else list(sides)}
        if note := self.notes.pop("data.input_size", None):
            self.notes["data.input_size_max"] = note
        return {"input_size_min": low, "input_size_max": sides[0], "resolution_step": self.step}

    def _judged(self, objective: dict[str, Any], spec: DataSpec) -> dict[str, Any]:
        """The objective without perceptual losses that cannot judge such samples."""
        judges, weights = dict(objective.get("percept", {})), dict(objective.get("weights", {}))
        for label, node in objective.get("percept", {}).items():
            try:
                made("percept", node, spec=spec)
            except VqcoreError as error:
                del judges[label]
                weights.pop(f"percept/{label}", None)
                self.notes.pop("objective.percept", None)
                self.notes["objective"] = f"The family's perceptual loss is left out. {first_line(error)}."
        both = {"percept": judges, "weights": weights}
        return {key: node for key, node in {**objective, **both}.items() if node or key not in both}

    def _schedule(self, tree: Mapping[str, Any], found: Draft) -> None:
        """Say how many steps the family's epochs are here."""
        if "epochs" not in tree["run"]:
            return
        samples = round(found.parts * (1 - found.held / found.samples))
        step = tree["data"]["batch_size"] * tree["optim"].get("accumulate", 1)
        one, all_ = (max(1, round(tree["run"]["epochs"] * samples / (step * n))) for n in (1, PROCESSES))
        few = "please check, these are few: " if all_ < FEW else ""
        self.notes["run.epochs"] = (
            f"{few}{samples:,} training samples make {one:,} steps in all, or with {PROCESSES} processes {all_:,}"
        )


def _listing(modality: Modality, path: Path) -> Listing:
    """The files that a modality may read. Raises `DataError` if there are none."""
    try:
        return Listing(str(path), modality.suffixes, "data.path")
    except DataError:
        if not path.is_dir():
            raise
        raise DataError(f"it reads {listed(modality.suffixes)}") from None


def _built(cfg: TokenizerConfig) -> Tokenizer:
    """The tokenizer without values, or with values if a part, such as a teacher, needs them to be built."""
    try:
        with torch.device("meta"):
            return Tokenizer(cfg, fetch=False)
    except (RuntimeError, NotImplementedError):
        return Tokenizer(cfg, fetch=False)


def _extents(modality: Modality, files: Listing) -> list[tuple[int, ...]]:
    """The sizes of some files, as the modality reads them."""
    return [modality.extent(modality.read(files.path(place))) for place in places(len(files))[:FILES]]


def _labelled(
    node: dict[str, Any], path: Path, size: tuple[int, ...], notes: dict[str, str]
) -> dict[str, Any]:
    """The settings of a modality of class maps with the classes of these files; other settings are unchanged."""
    if "num_labels" not in vars(registry().load("modality", node["name"]))["Config"].__dataclass_fields__:
        return node
    any_id = {key: value for key, value in node.items() if key != "shift"} | {"num_labels": IDS}
    modality: Modality = made("modality", any_id, size=size)
    files = _listing(modality, path)
    ids = np.unique(
        np.concatenate([np.unique(modality.read(files.path(place))) for place in places(len(files))])
    )
    none = ids[-1] == NOTHING and len(ids) > 1
    found = {**any_id, "num_labels": int(ids[-1 - none]) + 1}
    void = f"; {NOTHING} as well, taken for no class" if none else ""
    notes["num_labels"] = f"please check: the files hold ids up to {ids[-1 - none]}{void}"
    return found | ({"ignore_label": NOTHING} if none else {})
