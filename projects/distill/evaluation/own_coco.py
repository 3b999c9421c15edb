"""COCO's evaluation of a user's own data set, whose classes are matched by name."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.evaluation import COCOEvaluator

from ..data.checks.coco_file import CocoFile
from ..data.normalise import in_place_of_files


class OwnCOCOEvaluator(COCOEvaluator):
    """detectron2's evaluator with the normalised content of an annotation file.

    Args:
        dataset_name: name of a data set of ``DATASETS.COCO_FORMAT``.
        file: its annotation file.
        class_indices: for each class of the model, its index in the data set; -1 for a class that
            the data set lacks, whose detections are left out. None: the classes are the same.
        options: other arguments of :class:`COCOEvaluator`.
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
        self.class_indices = None if class_indices is None else torch.tensor(class_indices)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        super().process(inputs, [self._renamed(output) for output in outputs])

    def _renamed(self, output: dict[str, Any]) -> dict[str, Any]:
        if self.class_indices is None or "instances" not in output:
            return output
        instances = output["instances"].to("cpu")
        classes = self.class_indices[instances.pred_classes]
        kept = instances[classes >= 0]
        kept.pred_classes = classes[classes >= 0]
        return {**output, "instances": kept}
