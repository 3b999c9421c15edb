"""Detections of a teacher as labels of an image, which move with its objects."""

from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances, pairwise_iou
from numpy.typing import NDArray

from ..structures import DETECTIONS
from .ignored_regions import IgnoredRegionsMapper

SAME_OBJECT = 0.5  # IoU with an annotated box from which a detection is of the same object


class Found(NamedTuple):
    """Detections of an image.

    Attributes:
        boxes: (N, 4) XYXY in pixels.
        scores: (N,) in [0, 1].
        classes: (N,) indices of the student's classes.
    """

    boxes: NDArray[Any] = np.zeros((0, 4), np.float32)
    scores: NDArray[Any] = np.zeros(0, np.float32)
    classes: NDArray[Any] = np.zeros(0, np.int64)

    def instances(self, size: tuple[int, int]) -> Instances:
        """Return the detections in an image of (height, width) ``size``, to which they are cut."""
        found = Instances(size)
        found.pred_boxes = Boxes(torch.as_tensor(self.boxes, dtype=torch.float32).reshape(-1, 4))
        found.scores = torch.as_tensor(self.scores, dtype=torch.float32)
        found.pred_classes = torch.as_tensor(self.classes, dtype=torch.int64)
        found.pred_boxes.clip(size)
        return found[found.pred_boxes.nonempty()]


def with_added(truth: Instances, found: Instances, least_score: float) -> Instances:
    """Return ground truth and some detections, as further objects.

    Teach-DETR (Huang et al., 2023) weights the loss of a teacher's box by its score. detectron2's
    losses have no weight per box. So a box is an object with its score as the probability, drawn
    anew for every sample. The expectation of a cross entropy is then that of soft labels.

    Detections of an annotated object are left out: each object is trained on one box.

    Args:
        truth: with ``gt_boxes`` and ``gt_classes`` only.
        found: detections of the same image.
        least_score: least score of a box.
    """
    drawn = torch.as_tensor(np.random.random_sample(len(found))) < found.scores
    iou = pairwise_iou(found.pred_boxes, truth.gt_boxes)
    other = ~(iou >= SAME_OBJECT).any(1)
    kept = found[drawn & other & (found.scores >= least_score)]
    boxes, classes = kept.pred_boxes, kept.pred_classes
    added = Instances(truth.image_size, gt_boxes=boxes, gt_classes=classes)
    return Instances.cat([truth, added])


class DetectionsMapper(IgnoredRegionsMapper):
    """detectron2's mapper for images with detections of a teacher.

    Their boxes move as the annotated ones. They are the :data:`DETECTIONS` of its outputs.

    Args:
        is_train: as in :class:`IgnoredRegionsMapper`.
        added_score: least score of detections that become objects; 0: none do.
        options: other arguments of :class:`IgnoredRegionsMapper`.
    """

    @configurable
    def __init__(self, is_train: bool, *, added_score: float, **options: Any):
        super().__init__(is_train, **options)
        self.added_score = added_score

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        added = cfg.MODEL.DISTILL.TEACHER.ADD_BOXES
        return {**super().from_config(cfg, is_train), "added_score": added}

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        found = dataset_dict.get(DETECTIONS, Found())  # images of other sets may be drawn
        moved = found._replace(boxes=transforms.apply_box(found.boxes)).instances(image_shape)
        dataset_dict[DETECTIONS] = moved
        if self.added_score:
            truth = dataset_dict["instances"]
            dataset_dict["instances"] = with_added(truth, moved, self.added_score)
