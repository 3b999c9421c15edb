"""COCO's evaluation of a user's own data set, whose classes are matched by name."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Instances

from ..data.checks.coco_file import CocoFile
from ..data.normalise import in_place_of_files
from .coco_recall import COCORecallEvaluator


class OwnCOCOEvaluator(COCORecallEvaluator):
    """detectron2's evaluator with the normalised content of an annotation file.

    Args:
        dataset_name: name of a data set of ``DATASETS.COCO_FORMAT``.
        file: its annotation file.
        class_indices: for each class of the model, its index in the data set; -1 for a class that
            the data set lacks, whose detections are left out. None: the classes are the same.
        options: other arguments of detectron2's ``COCOEvaluator``.
    """

    def __init__(
        self,
        dataset_name: str,
        file: CocoFile,
        class_indices: Sequence[int] | None = None,
        **options: Any,
    ):
        with in_place_of_files({"info": {}, **file.content}):
            super().__init__(dataset_name, **options)
        self.class_indices = class_indices

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        renamed = [
            {**x, "instances": with_classes(x["instances"].to("cpu"), self.class_indices)}
            if "instances" in x
            else x
            for x in outputs
        ]
        super().process(inputs, renamed)


def with_classes(instances: Instances, class_indices: Sequence[int] | None) -> Instances:
    """Return detections with the class indices of a data set.

    Args:
        instances: detections on the CPU.
        class_indices: see :class:`OwnCOCOEvaluator`.
    """
    if class_indices is None:
        return instances
    classes = torch.tensor(class_indices)[instances.pred_classes]
    kept = instances[classes >= 0]
    kept.pred_classes = classes[classes >= 0]
    return kept
