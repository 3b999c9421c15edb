"""VOC's evaluation of a user's own data set, whose classes are matched by name."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.evaluation import PascalVOCDetectionEvaluator, pascal_voc_evaluation

from ..data.checks.voc_folder import VOCFolder
from ..data.class_order import indices_by_name
from .own_coco import with_classes


class OwnVOCEvaluator(PascalVOCDetectionEvaluator):
    """detectron2's evaluator of the classes that have objects in the data set.

    detectron2 makes words and names of files from ids and classes, so they are numbers here.

    Args:
        dataset_name: name of a data set of ``DATASETS.VOC_FORMAT``.
        files: its files.
        classes: class names of the model's outputs.
    """

    def __init__(self, dataset_name: str, files: VOCFolder, classes: Sequence[str]):
        super().__init__(dataset_name)
        names = files.evaluated_classes()
        self._class_names = [str(k) for k in range(len(names))]
        self._anno_file_template = "{}"
        self.class_indices = indices_by_name(classes, names)
        self.image_indices = {id: k for k, id in enumerate(files.objects)}
        self.objects = [
            [{**x, "name": str(names.index(x["name"]))} for x in found if x["name"] in names]
            for found in files.objects.values()
        ]

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        images = [{"image_id": self.image_indices[x["image_id"]]} for x in inputs]
        own = [with_classes(x["instances"].to("cpu"), self.class_indices) for x in outputs]
        super().process(images, [{"instances": x} for x in own])

    def evaluate(self) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            self._image_set_path = os.path.join(folder, "images.txt")
            with open(self._image_set_path, "w") as f:
                f.writelines(f"{k}\n" for k in range(len(self.objects)))
            with _in_place_of_files(lambda image: self.objects[int(image)]):
                return super().evaluate()


@contextmanager
def _in_place_of_files(objects: Callable[[str], list[dict[str, Any]]]) -> Iterator[None]:
    """Let detectron2's evaluator take the objects of an image from a function."""
    stock = pascal_voc_evaluation.parse_rec
    pascal_voc_evaluation.parse_rec = objects
    try:
        yield
    finally:
        pascal_voc_evaluation.parse_rec = stock
