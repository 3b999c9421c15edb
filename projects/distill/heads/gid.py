"""General instance distillation (GID) of the boxes on which the networks differ most."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..errors import ConfigError
from ..losses import general_instances, gid_feature, gid_relation, gid_response
from ..losses.boxes import expected_distances, pairwise_iou
from ..losses.reduce import full_precision
from ..section import SWITCH, Key, Section, at_least
from ..structures import NetworkInfo, NetworkOutputs
from ..utils.distributed import reduce_mean
from .base import DISTILL_HEAD_REGISTRY
from .dense import AnchorGrids, layout_of
from .fpn import DenseFPNHead

SIDE = 10  # in cells, of the crop of an instance's features


@DISTILL_HEAD_REGISTRY.register()
class GID(DenseFPNHead):
    """GID: compare features, relations and predictions of general instances.

    See :func:`distill.losses.general_instances`. The box of an instance is that of the network with
    the higher score at the anchor. Predictions are compared at the anchors that the student's
    matcher gives to the instances. For GFL's distributions these are the expected distances, as
    TID's GIbox. The paper adapts the student's maps by a 3x3 convolution that all levels share. The
    released code never applies it (``shared_adapter=False``): only differing channels are adapted,
    by 1x1.

    Args:
        strides: strides of the levels in pixels.
        grids: the student's anchors.
        distributions: True if the networks predict distributions of box sides.
        threshold: IoU from which an anchor belongs to an instance, as its best anchor always does.
        feature_weight, relation_weight, class_weight, box_weight: factors of the parts.
        shared_adapter: True to adapt by the 3x3 convolution.
    """

    section = Section(
        FEATURE_WEIGHT=Key(5e-4, "factor of the features", at_least(0), term="feature"),
        RELATION_WEIGHT=Key(40.0, "factor of the relations", at_least(0), term="relation"),
        CLASS_WEIGHT=Key(0.1, "factor of the class logits", at_least(0), term="cls"),
        BOX_WEIGHT=Key(1.0, "factor of the box deltas", at_least(0), term="box"),
        SHARED_ADAPTER=Key(
            True,
            "a 3x3 convolution of the student's maps that all levels share, as in the paper; "
            "False: as in the released code",
            SWITCH,
        ),
    )
    needs = frozenset({"features", "dense", "dense_boxes"})

    @configurable
    def __init__(
        self,
        *,
        strides: list[float],
        grids: AnchorGrids,
        threshold: float,
        distributions: bool = False,
        feature_weight: float,
        relation_weight: float,
        class_weight: float,
        box_weight: float,
        shared_adapter: bool,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if shared_adapter:
            (channels,) = set(self.channels)
            shared = nn.Conv2d(*channels, kernel_size=3, padding=1)
            self.adapters = nn.ModuleDict(dict.fromkeys(self.parts, shared))
        self.parts = ("feature", "relation", "cls", "box")
        self.pooler = ROIPooler(SIDE, [1 / k for k in strides], 2, "ROIAlignV2")
        self.grids = grids
        self.threshold = threshold
        self.distributions = distributions
        self.factors = dict(
            zip(self.parts, (feature_weight, relation_weight, class_weight, box_weight))
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo
    ) -> dict[str, Any]:
        layout = layout_of(student)
        arguments = super().from_config(cfg, student, teacher)
        channels = student.channels_of(layout.levels)
        if arguments["shared_adapter"] and len(channels) > 1:
            raise ConfigError(
                "MODEL.DISTILL.GID.SHARED_ADAPTER is True, but the student's levels have different "
                f"channels: {channels}; set it to False."
            )
        return {
            **arguments,
            "strides": layout.strides,
            "grids": AnchorGrids(layout),
            "threshold": layout.thresholds[1],
            "distributions": layout.reg_max is not None,
        }

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: NetworkInfo) -> str | None:
        problem = super().problem(student, teacher)
        if problem:
            return problem
        if layout_of(student).objectness:
            return "an RPN does not say how sure it is of a class"
        layouts = [layout_of(net) for net in (student, teacher)]
        encodings = [x.box_encoding if x.reg_max is None else "distances" for x in layouts]
        if encodings[0] != encodings[1]:
            return "it compares box deltas, and the networks encode boxes in different ways"
        channels = teacher.channels_of(layout_of(teacher).levels)
        if len(channels) > 1:
            return f"it stacks crops of all levels; the teacher's have {channels} channels"
        return None

    def losses(self, student: NetworkOutputs, teacher: NetworkOutputs) -> dict[str, Tensor]:
        assert student.dense is not None and teacher.dense is not None
        pairs = zip(student.dense.logits, teacher.dense.logits)
        logits = [torch.cat(x, 1) for x in zip(*(self.classes.select(*pair) for pair in pairs))]
        deltas = [torch.cat(x.deltas, 1) for x in (student.dense, teacher.dense)]
        if self.distributions:
            deltas = [expected_distances(full_precision(x)) for x in deltas]
        boxes, valid = self.instances(student, teacher, logits)
        found = [Boxes(x) for x in boxes]
        crops = [self.pooler(list(x), found) for x in zip(*self.maps(student, teacher))]
        selected = self.selected(boxes, student)
        classes, regression = gid_response((logits[0], logits[1]), (deltas[0], deltas[1]), selected)
        number = reduce_mean(selected.sum())
        kept = valid.flatten()
        losses = {
            "feature": gid_feature(crops[0], crops[1], kept),
            "relation": gid_relation(crops[0].flatten(1), crops[1].flatten(1), kept),
            "cls": classes / number,
            "box": regression / number,
        }
        return {part: losses[part] * factor for part, factor in self.factors.items()}

    @torch.no_grad()
    def instances(
        self, student: NetworkOutputs, teacher: NetworkOutputs, logits: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return (N, K, 4) boxes, and (N, K) bool: True for boxes that exist."""
        ours, theirs = (x.float().amax(2).sigmoid() for x in logits)
        own, other = (torch.cat(x.dense_boxes, 1) for x in (student, teacher))
        boxes = other.where((theirs > ours)[..., None], own)
        sizes = [x.image_size for x in student.batch.instances]
        return general_instances((theirs - ours).abs(), boxes, sizes)

    @torch.no_grad()
    def selected(self, boxes: Tensor, student: NetworkOutputs) -> Tensor:
        """Return (N, R) 1 for the anchors of an instance, else 0; empty boxes have no anchors."""
        assert student.dense is not None
        anchors = torch.cat([x.flatten(0, 2) for x in self.grids(student.dense.sizes)])
        iou = pairwise_iou(boxes.flatten(0, 1), anchors)
        best = (iou > 0) & (iou == iou.amax(1, keepdim=True))
        return ((iou >= self.threshold) | best).view(*boxes.shape[:2], -1).any(1).float()
