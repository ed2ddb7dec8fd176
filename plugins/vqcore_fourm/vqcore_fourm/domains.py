"""4M's modalities that have a tokenizer (`domain` of its scripts), and what reads the same files here.

A new domain of 4M is a row of this table. The table in docs/from-4m.md is made from it (`table`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Domain:
    """One domain: the modality of ours, the folder of its files below 4M's `data_path`, and what differs (`remark`)."""

    modality: Mapping[str, Any]
    folder: str
    cropped: bool = True
    """`min_crop_scale` has a meaning."""
    features: bool = False
    """Feature maps: a position is a token, and sizes count positions."""
    vector: bool = False
    """Vectors have no size."""
    masks: bool = False
    """Masks have a size of their own."""
    labels: bool = False
    """Class maps."""
    bounded: bool = True
    """Values lie in [-1, 1]."""
    remark: str = ""


_CLIP = {"name": "percept/clip", "model": "ViT-B-16", "pretrained": "openai"}
_DINO = {"name": "percept/timm", "model": "vit_base_patch14_dinov2.lvd142m", "resize": False}
_FILES = (
    "ImageBind is no teacher here: write its features as .npy files of (c, h, w), or (c,), into data.path."
)
_PICTURES = (
    "CLIP's features are made of pictures normalized as CLIP was trained; 4M took the numbers of ImageNet."
)

DOMAINS = {
    "rgb": Domain({"name": "rgb"}, "rgb"),
    "depth": Domain(
        {
            "name": "vision/depth",
            "scaling": "standardise",
            "factor": 1 / 65535,
            "invalid": [],
            "resample": "pillow-nearest",
        },
        "depth",
        bounded=False,
    ),
    "normal": Domain({"name": "vision/normal", "unit": False, "tolerance": None}, "normal"),
    "canny_edge": Domain(
        {"name": "vision/edge"},
        "canny_edge",
        remark="Edges have one channel here; 4M declares one and reads three.",
    ),
    "sam_edge": Domain(
        {"name": "vision/edge"},
        "sam_edge",
        remark="Edges have one channel here; 4M declares one and reads three.",
    ),
    "semseg_coco": Domain(
        {"name": "vision/semseg", "num_labels": 134, "shift": True, "resample": "pillow-nearest"},
        "semseg_coco",
        labels=True,
    ),
    "CLIP-B16": Domain(
        {"name": "vision/features", "channels": 512, "teacher": _CLIP, "hflip": 0.5},
        "rgb",
        features=True,
        remark=_PICTURES,
    ),
    "DINOv2-B14": Domain(
        {"name": "vision/features", "channels": 768, "teacher": _DINO, "hflip": 0.5}, "rgb", features=True
    ),
    "DINOv2-B14-global": Domain(
        {"name": "vision/vector", "channels": 768, "teacher": {**_DINO, "output": "global"}, "stride": 224},
        "rgb",
        cropped=False,
        vector=True,
        remark="A vector has no size: the teacher sees pictures of 224 pixels, which are not cropped at random.",
    ),
    "ImageBind-H14": Domain(
        {"name": "vision/features", "channels": 1280},
        "ImageBind-H14",
        cropped=False,
        features=True,
        remark=_FILES,
    ),
    "ImageBind-H14-global": Domain(
        {"name": "vision/vector", "channels": 1280},
        "ImageBind-H14-global",
        cropped=False,
        vector=True,
        remark=_FILES,
    ),
    "sam_mask": Domain(
        {"name": "vision/instance"},
        "sam_mask",
        masks=True,
        remark="4M's pickled polygons are converted once: python -m vqcore_fourm.instances SAM RGB NEW_FOLDER "
        "--allow-pickle; then data.path is NEW_FOLDER.",
    ),
    "human_poses": Domain(
        {
            "name": "vision/pose",
            "joints": 23,
            "value": "rotation-matrix",
            "key": "pred_smpl_params.body_pose",
            "missing": "zeros",
        },
        "human_poses",
        cropped=False,
        vector=True,
    ),
}
"""Every domain by 4M's name."""


def table() -> str:
    """The table of docs/from-4m.md: what reads the files of each domain."""
    rows = ["| domain of 4M | folder | modality here |", "| --- | --- | --- |"]
    for name, domain in DOMAINS.items():
        settings = ", ".join(f"{key}: {_shown(value)}" for key, value in domain.modality.items())
        rows.append(f"| `{name}` | `{domain.folder}` | `{{{settings}}}` |")
    return "\n".join(rows)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(each)}' for key, each in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
