"""Layout of a dense head: where its predictions lie, and its last layers."""

import copy
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor, nn

from ..structures import DenseLayout

SUBNETS = ("cls_subnet", "bbox_subnet")  # in detectron2's RetinaNetHead and its relatives


def dense_layout(
    detector: Any, levels: list[str], shapes: dict[str, ShapeSpec], objectness: bool = False
) -> DenseLayout:
    """Return the layout of a dense head.

    Args:
        detector: owner of ``anchor_generator`` and ``box2box_transform``: an RPN or the model.
        levels: names of the features that the head reads.
        shapes: channels and strides of the features.
        objectness: True for an RPN.
    """
    head = getattr(detector, "head", None)
    return DenseLayout(
        objectness=objectness,
        levels=list(levels),
        strides=[shapes[name].stride for name in levels],
        anchors=[x.detach().cpu() for x in detector.anchor_generator.cell_anchors],
        offset=detector.anchor_generator.offset,
        thresholds=_thresholds(detector),
        box2box_transform=detector.box2box_transform,
        box_dim=box_dim(detector),
        reg_max=getattr(detector, "reg_max", None),
        candidates=getattr(detector, "candidates", DenseLayout.candidates),
        subnet_channels=_subnet_channels(head),
        centerness=hasattr(head, "ctrness"),
    )


def box_dim(detector: Any) -> int:
    """Return how many numbers encode a box: 4 in detectron2's own detectors."""
    return getattr(detector, "box_dim", 4)


def _thresholds(detector: Any) -> tuple[float, float]:
    """Return the matcher's thresholds, or RetinaNet's 0.4 and 0.5 if the assignment is adaptive."""
    matcher = getattr(detector, "anchor_matcher", None)
    bounds = getattr(matcher, "thresholds", None)  # the matcher adds both infinities
    return (bounds[1], bounds[-2]) if bounds else (0.4, 0.5)


def subnets(head: Any) -> dict[str, nn.Sequential]:
    """Return the subnets of a RetinaNetHead by name; a head of another kind may have fewer."""
    found = {name: getattr(head, name, None) for name in SUBNETS}
    return {name: x for name, x in found.items() if isinstance(x, nn.Sequential)}


def _subnet_channels(head: Any) -> tuple[list[int], list[int]] | None:
    channels = [
        [module.out_channels for module in subnet if isinstance(module, nn.Conv2d)]
        for subnet in subnets(head).values()
    ]
    return (channels[0], channels[1]) if len(channels) == len(SUBNETS) else None


def before_activations(subnet: nn.Sequential) -> list[int]:
    """Return the indices of the modules before an activation: convolutions, or their norms."""
    return [k - 1 for k, module in enumerate(subnet) if isinstance(module, nn.ReLU)]


class LastLayers:
    """The last layers of a dense head; they share their modules with the head.

    Args:
        detector: a dense detector whose head is a RetinaNetHead or its relative.
        convs: last convolutions of each subnet that stay.
    """

    def __init__(self, detector: Any, convs: int):
        self.widths = (detector.num_classes, box_dim(detector), 1)
        self.head: Any = copy.copy(detector.head)
        self.head._modules = dict(detector.head._modules)
        for task, (name, subnet) in enumerate(subnets(detector.head).items()):
            first = before_activations(subnet)[-1 - convs] + 1
            setattr(self.head, name, nn.Sequential(_Pick(task), *list(subnet)[first:]))

    def __call__(self, features: list[list[Tensor]]) -> list[Tensor]:
        """Return (N, R, D) predictions, one tensor per output of the head.

        Args:
            features: (N, C, Hi, Wi) maps before an activation, by subnet and level.
        """
        outputs = self.head(list(zip(*features)))
        return [
            torch.cat([permute_to_N_HWA_K(x, width) for x in maps], 1)
            for maps, width in zip(outputs, self.widths)
        ]


class _Pick(nn.Module):
    """One of the maps of a level."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return maps[self.index]
