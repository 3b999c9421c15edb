"""Checks of the teacher's classes and predictions."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ..config import teacher_config
from ..data.datasets import class_names
from ..engine.evaluators import build_evaluators
from ..engine.teacher_outputs import classes_on, teacher_outputs
from ..errors import ConfigError
from ..heads.classes import ClassMap
from ..modeling.teacher import Teacher
from ..structures import NetworkInfo
from .dry_run import Inputs
from .report import Classes, TeacherAP, TeacherCheck

IOU = 0.5  # smallest IoU at which a box of the right class finds an object
OBJECTS, PIXELS = "objects found", "pixel accuracy"
EVALUATED = ("coco", "kitti", "sem_seg")  # types of evaluators that accept a part of a data set


def compare_classes(cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo) -> Classes:
    """Compare the class names of student and teacher."""
    own, theirs = list(student.classes), list(teacher.classes)
    shared = set(own) & set(theirs)
    if own == theirs:
        relation = "same"
    elif not shared:
        relation = "no name in common"
    else:
        relation = "other order" if set(own) == set(theirs) else "mapped"
    listed = cfg.MODEL.DISTILL.TEACHER.CLASSES
    if not listed and teacher.kind == "FeatureExtractor":
        listed = theirs  # it has the names of its detections, or no classes
    elif not listed:
        listed = class_names(teacher_config(cfg), semantic=not teacher.has_boxes)
    return Classes(
        student=own,
        teacher=theirs,
        relation=relation,
        shared=len(shared),
        only_student=[name for name in own if name not in shared],
        only_teacher=[name for name in theirs if name not in shared],
        known=listed is not None and list(listed) == theirs,
    )


@torch.no_grad()
def check_teacher(
    teacher: Teacher, classes: ClassMap, batches: Sequence[Inputs], device: str, ignored: int
) -> TeacherCheck | None:
    """Compare the teacher's predictions for the batches with their ground truth.

    Args:
        teacher: the teacher.
        classes: classes of the student and of the teacher.
        batches: batches of the student.
        device: device of the student.
        ignored: label of pixels that do not count.

    Returns:
        None if the images have no labels for the predictions of the teacher.
    """
    teacher.model.to(device)
    outputs = [output for batch in batches for output in teacher.model(as_asked(teacher, batch))]
    inputs = [image for batch in batches for image in batch]
    if all("instances" in x for x in (*inputs, *outputs)):
        truths = [x["instances"] for x in inputs]
        return objects_found(truths, [x["instances"].to("cpu") for x in outputs], classes)
    if all("sem_seg" in x for x in (*inputs, *outputs)):
        predicted = [x["sem_seg"].argmax(0).cpu().flatten() for x in outputs]
        labels = [x["sem_seg"].flatten() for x in inputs]
        return pixel_accuracy(torch.cat(labels), torch.cat(predicted), classes, ignored)
    return None


def as_asked(teacher: Teacher, batch: Inputs) -> Inputs:
    """Convert a batch of the student to inputs of the teacher's own inference."""
    return [
        {"image": teacher.image(x["image"]), "height": height, "width": width}
        for x in batch
        for height, width in [x["image"].shape[1:]]
    ]


def objects_found(
    truths: Sequence[Instances], predictions: Sequence[Instances], classes: ClassMap
) -> TeacherCheck | None:
    """Return the share of objects found, and the mean share with predictions for other images."""
    by_class = len(classes.in_student) > 0

    def found(truth: Instances, predicted: Instances) -> Tensor:
        iou = pairwise_iou(Boxes(truth.gt_boxes.tensor), predicted.pred_boxes)
        hit = iou >= IOU
        if by_class:
            wanted = classes.teacher_label[truth.gt_classes]
            hit &= wanted[:, None] == predicted.pred_classes
            return hit.any(1)[classes.known(truth.gt_classes)]
        return hit.any(1)

    n = len(truths)
    shifted = [
        torch.cat([found(truths[i], predictions[(i + shift) % n]) for i in range(n)])
        for shift in range(n)
    ]
    count = len(shifted[0])
    if count == 0:
        return None
    shares = [float(x.float().mean()) for x in shifted]
    chance = sum(shares[1:]) / max(n - 1, 1)
    return TeacherCheck(OBJECTS, shares[0], chance, count, by_class)


def pixel_accuracy(
    labels: Tensor, predicted: Tensor, classes: ClassMap, ignored: int
) -> TeacherCheck | None:
    """Return the share of (N,) pixels in the right class, and that of the most frequent class."""
    number = len(classes.position) - 1
    labelled = (labels != ignored) & (labels >= 0) & (labels < number)
    labels, predicted = labels[labelled], predicted[labelled]
    known = classes.known(labels)
    labels, predicted = labels[known], predicted[known]
    if len(labels) == 0:
        return None
    right = classes.teacher_label[labels] == predicted
    most = labels.bincount().max() / len(labels)
    return TeacherCheck(PIXELS, float(right.float().mean()), float(most), len(labels), True)


def no_better_than_chance(check: TeacherCheck) -> bool:
    """Return True unless the teacher is better than chance.

    There are few objects, so their share must exceed chance by two standard errors.
    """
    if check.measure == PIXELS:
        return check.value <= check.chance
    # Half an object is added, because a chance of 0 in a small sample does not mean impossible.
    chance = (check.chance * check.count + 0.5) / (check.count + 1)
    return check.value <= chance + 2 * math.sqrt(chance * (1 - chance) / check.count)


def teacher_ap(cfg: CfgNode, teacher: Teacher, info: NetworkInfo, images: int) -> TeacherAP:
    """Measure the teacher on the first images of ``DATASETS.TEST[0]``, with its own preprocessing.

    Args:
        cfg: the whole config.
        teacher: the teacher.
        info: description of the teacher.
        images: largest number of images.

    Raises:
        ConfigError: there is no test set, its evaluator needs all images, or no class is shared.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty; set it to the data set for --teacher-ap.")
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type")
    if kind not in EVALUATED:
        raise ConfigError(
            f"The evaluator of '{name}' ({kind}) needs the whole data set; leave out --teacher-ap "
            "and run `distill eval` with the teacher's config."
        )
    chosen = DatasetCatalog.get(name)[:images]
    classes = classes_on(cfg, name, info)
    if not len(classes.in_student):
        raise ConfigError(
            f"The teacher and '{name}' have no class name in common; set "
            "MODEL.DISTILL.TEACHER.CLASSES for --teacher-ap."
        )
    evaluator = build_evaluators(cfg, name, cfg.OUTPUT_DIR)[0]
    evaluator.reset()
    for inputs, outputs in teacher_outputs(cfg, teacher, classes, chosen):
        evaluator.process(inputs, outputs)
    part = {} if kind == "sem_seg" else {"img_ids": [x["image_id"] for x in chosen]}
    results = evaluator.evaluate(**part)
    metrics = {f"{task}/{k}": float(v) for task, row in results.items() for k, v in row.items()}
    return TeacherAP(name, len(chosen), metrics)
