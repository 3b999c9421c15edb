"""COCO's evaluation of a data set whose classes are matched by name, and COCO's results of it."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
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


class ResultCollector(DatasetEvaluator):
    """Keeps detections as COCO's results, with the categories of the data set.

    Args:
        dataset_name: name of the data set.
        class_indices: see :class:`OwnCOCOEvaluator`.
        masks: keep masks, too.
    """

    def __init__(
        self,
        dataset_name: str,
        class_indices: Sequence[int] | None = None,
        masks: bool = False,
    ):
        self.class_indices = class_indices
        self.left_out = ("pred_keypoints",) if masks else ("pred_masks", "pred_keypoints")
        known = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id", {})
        self.categories = {index: category for category, index in known.items()}
        self.reset()

    def reset(self) -> None:
        self.results: list[dict[str, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for entry, output in zip(inputs, outputs):
            instances = with_classes(output["instances"].to("cpu"), self.class_indices)
            for other in self.left_out:
                if instances.has(other):
                    instances.remove(other)
            self.results += instances_to_coco_json(instances, entry["image_id"])

    def evaluate(self) -> list[dict[str, Any]]:
        for result in self.results:
            index = result["category_id"]
            result["category_id"] = self.categories.get(index, index)
        return self.results
