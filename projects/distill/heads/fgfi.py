"""Fine-grained feature imitation (FGFI)."""

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..losses import fgfi, fgfi_masks
from ..section import FRACTION, Key, Section
from ..structures import NetworkInfo, NetworkOutputs
from .base import DISTILL_HEAD_REGISTRY
from .dense import AnchorGrids, layout_of
from .fpn import BoxedFPNHead, small_convolution
from .instances import RegionHead


@DISTILL_HEAD_REGISTRY.register()
class FGFI(RegionHead, BoxedFPNHead):
    """FGFI: compare cells whose anchors are near an object; see :func:`distill.losses.fgfi`.

    The authors imitate the one map of a VGG. On an FPN, all maps that the dense head (an R-CNN's
    RPN) reads are imitated. An object is compared with the anchors of all of them. The authors'
    adapter ends with a ReLU, as their map does. An FPN's maps have values below 0, so
    there is no ReLU here.

    Args:
        grids: the student's anchors.
        threshold: ψ in [0, 1].
    """

    section = Section(
        IN_FEATURES=None,
        WEIGHT=0.01,
        THRESHOLD=Key(
            0.5, "ψ: share of an object's best IoU from which an anchor is near it", FRACTION
        ),
    )
    rpn_share = 0.1
    adapter = staticmethod(small_convolution)

    @configurable
    def __init__(self, *, grids: AnchorGrids, threshold: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.grids = grids
        self.threshold = threshold

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        grids = AnchorGrids(layout_of(student))
        return {**super().from_config(cfg, student, teacher), "grids": grids}

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        problem = super().problem(student, teacher)
        return problem or (None if student.dense else "the student has no anchors")

    @classmethod
    def level_names(cls, cfg: CfgNode, student: NetworkInfo) -> tuple[str, ...]:
        return tuple(layout_of(student).levels)

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        maps = self.maps(student, teacher)
        grids = self.grids([tuple(s.shape[2:]) for s, _ in maps])
        masks = fgfi_masks(grids, student.batch.boxes, self.threshold)
        return {part: fgfi(s, t, mask) for part, (s, t), mask in zip(self.parts, maps, masks)}
