"""Scenes scenes as a data source: colour, depth, normals, classes, edges, instances, a pose and a sound, all exact.

Nothing is read and nothing is kept, whatever the number of samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from einops import rearrange

from vqcore.errors import did_you_mean, listed
from vqcore.protocols import Modality
from vqcore.rng import numpy_generator
from vqcore.schema import DataConfig
from vqcore_synth.melody import melody
from vqcore_synth.render import Hits, cast, colours, edges, is_visible, pixel_rays, project
from vqcore_synth.scene import Scene, draw_scene

What = Literal["rgb", "depth", "normal", "semseg", "edge", "instance", "pose", "visible", "audio"]
WHAT_OF = {
    **{name: name for name in ("rgb", "depth", "normal", "semseg", "edge", "instance", "pose", "audio")},
    "log-mel": "audio",
}
"""What a modality of the core gets when the config does not say."""
SIDE = 128
"""Side of a picture, in pixels, where neither the config nor the main modality gives one."""


class Scenes:
    """Sample i of a split is a function of (seed, split, i): a room with a person, balls and boxes, and a melody.

    By `what`, with a picture's height h and width w: rgb uint8 (h, w, 3); depth float32 (h, w), metres along the
    camera's axis; normal float32 (3, h, w), unit vectors, x right, y up, z towards the viewer; semseg uint8 (h, w),
    classes as in `scene.CLASSES`; edge uint8 (h, w), 255 on the nearer side of a border of class, instance or depth;
    instance uint16 (h, w), 0 for the room; pose float32 (17, 2), COCO's keypoints as x and y in pixels; visible uint8
    (17,), 1 where nothing is before a joint; audio float32 (n,), -1..1. One ray goes through the centre of each pixel;
    only the colours of pixels in high contrast are means.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(DataConfig):
        """Settings of synthetic scenes."""

        what: What | None = None
        """What the main modality gets; by default what its name says."""
        extra_what: dict[str, What] = field(default_factory=dict)
        """What rides along, by label of data.extra; by default what the name of its modality says."""
        seed: int = 0
        """Other seeds, other scenes."""
        samples: int = 10_000
        """Number of training samples; they take no memory."""
        eval_samples: int = 500
        """Number of samples for evaluation, none of which is a training sample; 0 for none."""
        side: int | tuple[int, int] | None = None
        """Side of the pictures, or height and width, in pixels; by default the main modality's nominal size."""
        objects: tuple[int, int] = (3, 8)
        """Smallest and largest number of balls and boxes in a scene, where there is room for them."""
        length: int = 16_000
        """Samples of a sound."""
        rate: int = 16_000
        """Samples of a sound in one second."""

        @property
        def has_eval(self) -> bool:
            """There are unless `eval_samples` is 0."""
            return self.eval_samples > 0

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("samples", "length", "rate"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
            if self.eval_samples < 0:
                raise ValueError(f"eval_samples={self.eval_samples} is negative")
            if any(side < 1 for side in _pair(self.side or SIDE)):
                raise ValueError(f"side={self.side} has a side below 1")
            if not 0 <= self.objects[0] <= self.objects[1]:
                raise ValueError(
                    f"objects={list(self.objects)} must be two numbers from 0 on in rising order"
                )
            for label in self.extra_what:
                if label not in self.extra:
                    hint = did_you_mean(label, self.extra) or f" Labels: {listed(self.extra) or 'none'}."
                    raise ValueError(f"extra_what.{label}: there is no data.extra.{label}.{hint}")

    def __init__(
        self,
        cfg: Config,
        *,
        split: Literal["train", "eval"],
        modality: Modality,
        extra: Mapping[str, Modality],
    ):
        self._seed = (cfg.seed, "synthetic", split)
        self._length = cfg.samples if split == "train" else cfg.eval_samples
        nominal = modality.spec.size if modality.spec.rank == 2 else SIDE
        self._size = _pair(cfg.side if cfg.side is not None else nominal)  # type: ignore[arg-type]
        self._cfg = cfg
        self._what = {"": _what("what", cfg.what, cfg.modality.name)}
        for label in extra:
            wanted = cfg.extra_what.get(label)
            self._what[label] = _what(f"extra_what.{label}", wanted, cfg.extra[label].name)
        self._last: tuple[int, Scene, Hits | None] | None = None

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """The sample's number, padded with zeros."""
        return f"{index:0{len(str(self._length - 1))}d}"

    def get(self, index: int, label: str = "") -> np.ndarray:
        """What a label's modality reads, newly made."""
        what = self._what[label]
        if what == "audio":
            return melody(self._cfg.length, self._cfg.rate, *self._seed, index)
        scene = self._scene(index)
        if what == "pose":
            return project(scene.camera, self._size, scene.figure.joints).astype(np.float32)
        if what == "visible":
            return is_visible(scene, self._size).astype(np.uint8)
        return self._picture(what, scene, self._hits(index))

    def _picture(self, what: str, scene: Scene, hits: Hits) -> np.ndarray:
        if what == "rgb":
            return colours(scene, self._size, hits)
        if what == "edge":
            return np.where(edges(hits, self._size), np.uint8(255), np.uint8(0))
        if what == "normal":
            seen = (scene.camera.turn @ hits.normal).astype(np.float32)
            return rearrange(seen, "c (h w) -> c h w", h=self._size[0])
        flat: dict[str, np.ndarray] = {
            "depth": hits.depth.astype(np.float32),
            "semseg": hits.label.astype(np.uint8),
            "instance": hits.thing.astype(np.uint16),
        }
        return rearrange(flat[what], "(h w) -> h w", h=self._size[0])

    # What rides along with a sample asks for the same scene again, so the last one is remembered.

    def _scene(self, index: int) -> Scene:
        if self._last is None or self._last[0] != index:
            rng = numpy_generator(*self._seed, index)
            self._last = index, draw_scene(rng, self._cfg.objects), None
        return self._last[1]

    def _hits(self, index: int) -> Hits:
        scene = self._scene(index)
        hits = self._last[2] if self._last else None
        if hits is None:
            hits = cast(scene, pixel_rays(scene.camera, self._size))
            self._last = index, scene, hits
        return hits

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}


def _what(setting: str, wanted: str | None, modality: str) -> str:
    found = wanted or WHAT_OF.get(modality)
    if found is None:
        choices = listed(What.__args__)  # type: ignore[attr-defined]
        raise ValueError(f"{setting} is not set, and '{modality}' could be anything: one of {choices}")
    return found


def _pair(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else side
