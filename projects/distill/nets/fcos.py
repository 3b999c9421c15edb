"""detectron2's FCOS, built from a config file."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..section import NUMBER, POSITIVE, Key, Section
from .dense import DENSE_SECTION, FOCAL_LOSS_SECTION, detector_arguments, head_arguments


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """detectron2's FCOS (:paper:`fcos`), which reads ``MODEL.FCOS``.

    detectron2 can build it only from Python. As in detectron2 it has centre sampling, the GIoU loss
    and centerness on the regression tower. Regressions are in units of the level's stride.
    """

    section = Section(
        SCORE_THRESH_TEST=Key(
            0.2, "lowest score, √(class probability · centerness), of a detection", NUMBER
        ),
        CENTER_SAMPLING_RADIUS=Key(1.5, "radius of the positive region in strides", POSITIVE),
    ).on_top_of({**DENSE_SECTION, **FOCAL_LOSS_SECTION})

    @configurable
    def __init__(self, *, head: nn.Module, **kwargs: Any):
        super().__init__(head=head, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.FCOS
        arguments = detector_arguments(cfg, node)
        return {
            **arguments,
            "head": fcos.FCOSHead(**head_arguments(node, arguments)),
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        # detectron2's GIoU fails on boxes in half precision, which autocast gives.
        full = [[x.float() for x in maps] for maps in predictions]
        return super().forward_training(images, features, full, gt_instances)
