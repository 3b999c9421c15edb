"""The teacher's detections in unlabelled images, counted and drawn."""

from itertools import islice
from typing import Any

import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ..evaluation.images import Pixels, draw_detections, stacked
from ..modeling.meta_arch import DistillModel
from ..modeling.unlabeled import is_unlabeled
from .dry_run import DryRun
from .report import DoctorReport, UnlabeledCheck

IMAGES = 16
COLUMNS = 4


def add_unlabeled(report: DoctorReport, dry_run: DryRun, drawing: str | None = None) -> None:
    """Add the objects that the teacher finds in the first unlabelled images of the training.

    Args:
        drawing: PNG file to write with these images and their objects; None: no file.
    """
    model = dry_run.model
    assert isinstance(model, DistillModel) and model.unlabeled, "it has unlabelled images"
    report.notes += [
        f"{name} does not learn from unlabelled images: it reads labels, or teaches itself."
        for name in sorted(model.unlabeled.idle)
    ]
    images = _first_images(dry_run)
    found = _objects(dry_run, model, images)
    counts = [len(x) for x in found]
    if found:
        report.unlabeled = UnlabeledCheck(len(found), sum(counts), counts.count(0))
    if found and not sum(counts):
        report.warnings.append(
            f"The teacher finds no object in {len(found)} unlabelled images; check "
            "DATASETS.UNLABELED, or lower MODEL.DISTILL.UNLABELED.SCORE."
        )
    if drawing:
        nothing = [Instances(tuple(x["image"].shape[-2:])) for x in images]
        Image.fromarray(_grid(dry_run, images, found or nothing)).save(drawing)


def _first_images(dry_run: DryRun) -> list[dict[str, Any]]:
    stream = (x for batch in dry_run.batches for x in batch if is_unlabeled(x))
    return list(islice(stream, IMAGES))


@torch.no_grad()
def _objects(dry_run: DryRun, model: DistillModel, images: list[dict[str, Any]]) -> list[Instances]:
    """Return the detections of each image that become objects; [] if the teacher detects none."""
    unlabeled = model.unlabeled
    if unlabeled is None or unlabeled.pseudo is None:
        return []
    teacher = model.teachers[unlabeled.teacher]
    found = []
    for image in images:
        with dry_run.autocast():
            known = model.detected(teacher, [image])
        size = tuple(image["image"].shape[-2:])
        found += unlabeled.pseudo.kept(known.detections, [size], known.batch.padded_size)
    return [x.to("cpu") for x in found]


def _grid(dry_run: DryRun, images: list[dict[str, Any]], found: list[Instances]) -> Pixels:
    info, drawn = dry_run.infos[0], []
    for image, objects in zip(images, found):
        pixels = convert_image_to_rgb(image["image"].permute(1, 2, 0), dry_run.cfg.INPUT.FORMAT)
        canvas = Visualizer(pixels)
        if len(objects):
            boxes = Instances(objects.image_size)
            for field in ("pred_boxes", "pred_classes", "scores"):
                boxes.set(field, objects.get(field))
            draw_detections(canvas, boxes, info.classes if info else ())
        drawn.append(canvas.get_output().get_image())
    rows = [stacked(drawn[k : k + COLUMNS], axis=1) for k in range(0, len(drawn), COLUMNS)]
    return stacked(rows, axis=0)
