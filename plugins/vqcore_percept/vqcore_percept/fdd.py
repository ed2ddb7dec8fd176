"""Frechet distance in the features of DINOv2 (arXiv 2306.04675), or of any picture model of timm."""

from dataclasses import dataclass, replace

from vqcore.config import at_least
from vqcore.protocols import DataSpec
from vqcore_percept.judges import FrechetSets
from vqcore_percept.nets import NetConfig
from vqcore_percept.timm import TimmTeacher


class FDD(FrechetSets):
    """Frechet distance of reconstructions and samples in DINOv2's features, and `kdd`, `precision`, `recall`.

    Differs from the paper: timm interpolates the positions of its model.
    """

    name, kernel_name = "percept/fdd", "kdd"

    @dataclass(frozen=True, kw_only=True)
    class Config(NetConfig):
        """Settings of `percept/fdd`."""

        model: str = "vit_large_patch14_dinov2.lvd142m"
        """timm's name of the model, with its weights. The paper has DINOv2 ViT-L/14."""
        side: int = 224
        """Pictures are resized to this number of pixels along each axis."""

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least(self, side=1)

    def __init__(self, cfg: Config, *, spec: DataSpec):
        super().__init__(cfg, spec=spec)
        side = (cfg.side, cfg.side)
        teacher = TimmTeacher.Config(
            name="percept/timm",
            model=cfg.model,
            weights=cfg.weights,
            rgb=cfg.rgb,
            dtype=cfg.dtype,
            resize=False,
            output="global",
        )
        self.judge = TimmTeacher(teacher, spec=replace(spec, size=side))
        self.judge.seen.size, self.judge.seen.mode = side, "bicubic"
        self.convention = (
            f"{cfg.model}, what its head sees: pictures of 8 bits, {cfg.side} x {cfg.side} bicubic, filtered; "
            "reference: the crops that the encoder saw; 3 neighbours"
        )
