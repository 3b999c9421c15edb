"""Images of predictions, which TensorBoard and trackers show for each evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.events import get_event_storage
from detectron2.utils.visualizer import Visualizer
from numpy.typing import NDArray

LONGEST_SIDE = 480  # pixels of a drawn image
MIN_SCORE = 0.3  # detections with a lower score are not drawn
GAP = 4  # white pixels between two images

GREY = (0.5, 0.5, 0.5)  # classes without a name

Pixels = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Color = tuple[float, ...]
"""Red, green and blue from 0 to 1."""


class ImageEvaluator(DatasetEvaluator):
    """Puts a grid of images into the event storage: their labels left, the predictions right.

    It draws the inputs that have their dataset dict as ``truth``, see
    :class:`~distill.data.loader.EvaluationLoader`, and returns no metrics. Only the main process
    has writers, so the images are those of its share of the test set: the first ones. A class has
    the same colour on both sides.

    Args:
        dataset_name: name of the data set.
        classes: class names of the model's outputs; a class without a name is a number.
    """

    def __init__(self, dataset_name: str, classes: Sequence[str]):
        self.name = dataset_name
        self.classes = classes
        metadata = MetadataCatalog.get(dataset_name)
        self.own_classes: Sequence[str] = metadata.get("thing_classes") or ()
        self.colors = _colors([*classes, *self.own_classes])
        stuff = metadata.get("stuff_classes") or []
        colors = [[255 * x for x in color] for color in _colors(stuff).values()]
        self.metadata = Metadata(stuff_classes=stuff, stuff_colors=colors)
        self.rows: list[Pixels] = []

    def reset(self) -> None:
        self.rows = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for entry, output in zip(inputs, outputs):
            if "truth" in entry:
                image = read_image(entry["truth"]["file_name"], "RGB")
                scale = min(1, LONGEST_SIDE / max(image.shape))
                left, right = (Visualizer(image, self.metadata, scale) for _ in range(2))
                self._draw_truth(left, entry["truth"])
                self._draw_output(right, output)
                sides = [x.get_output().get_image() for x in (left, right)]
                self.rows.append(stacked(sides, axis=1))

    def evaluate(self) -> None:
        if self.rows:
            grid = stacked(self.rows, axis=0)
            get_event_storage().put_image(f"predictions/{self.name}", grid.transpose(2, 0, 1))

    def _draw_truth(self, canvas: Visualizer, truth: dict[str, Any]) -> None:
        """Draw the objects of a dataset dict without crowds, or its semantic labels."""
        if "annotations" not in truth and "sem_seg_file_name" in truth:
            canvas.draw_dataset_dict({"sem_seg_file_name": truth["sem_seg_file_name"]})
        objects = [x for x in truth.get("annotations", ()) if not x.get("iscrowd")]
        if not objects:
            return
        masks = [x.get("segmentation") for x in objects]
        boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
        names = [_name(self.own_classes, x["category_id"]) for x in objects]
        canvas.overlay_instances(
            boxes=np.array(boxes, float),
            masks=masks if all(masks) else None,
            labels=names,
            assigned_colors=[self.colors.get(x, GREY) for x in names],
        )

    def _draw_output(self, canvas: Visualizer, output: dict[str, Any]) -> None:
        """Draw detections of at least :data:`MIN_SCORE`, or the most likely semantic classes."""
        if "instances" in output:
            found: Instances = output["instances"].to("cpu")
            draw_detections(canvas, found[found.scores >= MIN_SCORE], self.classes, self.colors)
        elif "sem_seg" in output:
            canvas.draw_sem_seg(output["sem_seg"].argmax(0).cpu(), area_threshold=0, alpha=0.5)


def draw_detections(
    canvas: Visualizer,
    found: Instances,
    classes: Sequence[str],
    colors: Mapping[str, Color] | None = None,
) -> None:
    """Draw all detections of an image with class names and scores.

    Args:
        canvas: canvas of the image, on which they are drawn.
        found: the detections on the CPU, in pixels of the image.
        classes: class names.
        colors: colour of each class; None: one for each name in ``classes``.
    """
    colors = _colors(classes) if colors is None else colors
    names = [_name(classes, k) for k in found.pred_classes.tolist()]
    canvas.overlay_instances(
        boxes=found.pred_boxes,
        masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
        keypoints=found.pred_keypoints if found.has("pred_keypoints") else None,
        labels=[f"{x} {score:.0%}" for x, score in zip(names, found.scores.tolist())],
        assigned_colors=[colors.get(x, GREY) for x in names],
    )


def _name(classes: Sequence[str], index: int) -> str:
    return classes[index] if index < len(classes) else f"class {index}"


def _colors(names: Sequence[str]) -> dict[str, Color]:
    """Return a colour for each name, in the order of their first places; many names share some."""
    palette = colormap(rgb=True, maximum=1).tolist()
    return {name: tuple(palette[k % len(palette)]) for k, name in enumerate(dict.fromkeys(names))}


def stacked(images: Sequence[Pixels], axis: int) -> Pixels:
    """Return images in a column (``axis`` 0) or row (1), with white pixels between and around."""
    across = max(x.shape[1 - axis] for x in images)
    padded = []
    for k, x in enumerate(images):
        margins = [(0, 0), (0, 0), (0, 0)]
        margins[axis] = (GAP if k else 0, 0)
        margins[1 - axis] = (0, across - x.shape[1 - axis])
        padded.append(np.pad(x, margins, constant_values=255))
    return np.concatenate(padded, axis)
