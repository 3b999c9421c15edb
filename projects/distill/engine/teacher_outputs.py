"""The teacher's own predictions for images of a test set, with its own preprocessing."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader

from ..config import teacher_config
from ..data.datasets import predicted_classes
from ..data.loader import inference_mapper
from ..heads.classes import ClassMap
from ..modeling.teacher import Teacher
from ..structures import NetworkInfo

Dicts = list[dict[str, Any]]


def classes_on(
    cfg: CfgNode, name: str, teacher: NetworkInfo, left_out: Collection[str] = ()
) -> ClassMap:
    """Return the map between the classes that are evaluated on a test set and the teacher's.

    Args:
        cfg: the whole config.
        name: name of the test set.
        teacher: description of the teacher.
        left_out: classes of the teacher that do not count.
    """
    metadata = MetadataCatalog.get(name)
    semantic = metadata.get("evaluator_type") == "sem_seg"
    names = metadata.get("stuff_classes") if semantic else predicted_classes(cfg, name)
    theirs = tuple("" if x in left_out else x for x in teacher.classes)  # "" is no class
    return ClassMap(tuple(names or teacher.classes), theirs)


@torch.no_grad()
def teacher_outputs(
    cfg: CfgNode, teacher: Teacher, classes: ClassMap, entries: Sequence[dict[str, Any]]
) -> Iterator[tuple[Dicts, Dicts]]:
    """Yield batches of inputs and the teacher's predictions, as detectron2's evaluators take them.

    Args:
        cfg: the whole config.
        teacher: the teacher.
        classes: see :func:`classes_on`.
        entries: dataset dicts of the images.
    """
    mapper = inference_mapper(teacher_config(cfg))
    teacher.model.to(cfg.MODEL.DEVICE)
    for inputs in build_detection_test_loader(entries, mapper=mapper):
        predictions = teacher.model(inputs)
        yield inputs, [renamed(x, classes, cfg.MODEL.MASK_ON) for x in predictions]


def renamed(output: dict[str, Any], classes: ClassMap, masks: bool) -> dict[str, Any]:
    """Map a prediction of the teacher to the classes of a data set, without other classes.

    Args:
        output: prediction for one image.
        classes: classes of the data set and of the teacher.
        masks: True if masks are evaluated.
    """
    if "instances" in output:
        instances = output["instances"].to("cpu")
        same = instances.pred_classes[:, None] == classes.in_teacher
        instances.pred_classes = classes.in_student[same.int().argmax(1)]
        if not masks and instances.has("pred_masks"):
            instances.remove("pred_masks")
        return {"instances": instances[same.any(1)]}
    logits = output["sem_seg"].cpu()
    ordered = logits.new_full((len(classes.position) - 1, *logits.shape[1:]), -math.inf)
    ordered[classes.in_student] = logits[classes.in_teacher]
    return {"sem_seg": ordered}
