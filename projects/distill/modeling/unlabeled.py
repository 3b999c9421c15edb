"""Student's forward on images without labels, whose objects are those that the teacher detects."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.structures import BitMasks, Boxes, Instances, ROIMasks
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage
from torch import Tensor, nn

from ..checkpoint.save import StudentState
from ..errors import ConfigError
from ..heads.base import head_of
from ..heads.classes import no_shared_class
from ..heads.instances import TeacherInstances
from ..structures import UNLABELED, NetworkInfo, NetworkOutputs
from ..utils.training import current_iteration

logger = logging.getLogger(__name__)

KEY = "MODEL.DISTILL.UNLABELED"


class PseudoLabels(nn.Module):
    """Ground truth that is made of a teacher's detections.

    Args:
        selection: leaves out detections of classes that the student lacks.
        scores: least score of each class of the student, (K,).
        masks: also make masks. They are those of the detections, or their boxes if the teacher has
            no masks.
        scale: size of the teacher's images relative to the student's.
    """

    scores: Tensor

    def __init__(
        self,
        selection: TeacherInstances,
        scores: Sequence[float],
        masks: bool = False,
        scale: float = 1.0,
    ):
        super().__init__()
        self.selection = selection
        self.masks = masks
        self.scale = scale
        self.register_buffer("scores", torch.tensor(scores), persistent=False)

    def forward(
        self, detections: list[Instances], sizes: Sequence[tuple[int, int]], padded: tuple[int, int]
    ) -> list[Instances]:
        """Return detectron2's ground truth of each image, see :meth:`kept`."""
        return [self._truth(x) for x in self.kept(detections, sizes, padded)]

    def kept(
        self, detections: list[Instances], sizes: Sequence[tuple[int, int]], padded: tuple[int, int]
    ) -> list[Instances]:
        """Return the detections of each image that become objects.

        Args:
            detections: the teacher's, in pixels of the padded input.
            sizes: (height, width) of the images, to which their objects are cut.
            padded: (height, width) of the padded input.
        """
        return [self._kept(x, size) for x, size in zip(self.selection(detections, padded), sizes)]

    def _kept(self, found: Instances, size: tuple[int, int]) -> Instances:
        boxes = Boxes(found.pred_boxes.tensor.float())
        boxes.clip(size)
        cut = Instances(size, **{**found.get_fields(), "pred_boxes": boxes})
        return cut[boxes.nonempty() & (found.scores >= self.scores[found.pred_classes])]

    def _truth(self, found: Instances) -> Instances:
        boxes, size = found.pred_boxes, found.image_size
        truth = Instances(size, gt_boxes=boxes, gt_classes=found.pred_classes)
        if self.masks:
            truth.gt_masks = BitMasks(self._masks(found, boxes, size))
        return truth

    def _masks(self, found: Instances, boxes: Boxes, size: tuple[int, int]) -> Tensor:
        """Return the (R, H, W) masks of detections in an image of (height, width) ``size``."""
        if not len(found):
            return self.scores.new_zeros(0, *size)
        masks: Any = found.scores.new_ones(len(found), 1, 28, 28)
        if found.has("pred_masks"):
            masks = found.pred_masks
        if isinstance(masks, ROIMasks):  # RTMDet-Ins: logits of the teacher's whole image
            height, width = (round(x / self.scale) for x in masks.image_size)
            whole: Tensor = masks.to_bitmasks(boxes, height, width).tensor
            return whole[:, : size[0], : size[1]]
        pasted: Tensor = paste_masks_in_image(masks[:, 0].float(), boxes, size)
        return pasted


class Unlabeled(nn.Module):
    """Labels that a student gets from its teacher, and their weight.

    Args:
        heads: names of all heads.
        idle: those that do not learn from these images.
        pseudo: makes their ground truth; None if no teacher detects objects.
        teacher: name of the teacher whose detections it takes.
        ignore_value: label of all pixels of a student with semantic labels; None for others.
        weight: weight of an unlabelled image in the student's own losses; a labelled one has 1.
        warmup_iters: iterations in which that weight rises linearly from 0.
    """

    def __init__(
        self,
        *,
        heads: Sequence[str],
        idle: frozenset[str],
        pseudo: PseudoLabels | None,
        teacher: str,
        ignore_value: int | None,
        weight: float,
        warmup_iters: int,
    ):
        super().__init__()
        self.heads = tuple(heads)
        self.idle = idle
        self.pseudo = pseudo
        self.teacher = teacher
        self.ignore_value = ignore_value
        self.weight = weight
        self.warmup_iters = warmup_iters

    def task_weight(self) -> float:
        """Return the weight in the student's own losses at the current iteration."""
        if not self.warmup_iters:
            return self.weight
        return self.weight * min(current_iteration() / self.warmup_iters, 1.0)

    def share(self, loss: str, labeled: int, unlabeled: int) -> float:
        """Return the share of the unlabelled images in the mean of a loss.

        share = w · unlabeled / (labeled + w · unlabeled)

        w is 1 for a head's loss, 0 for a head that does not learn from these images, and
        :meth:`task_weight` for a loss of the student's own.

        Args:
            loss: name of the loss.
            labeled, unlabeled: numbers of images.
        """
        head = head_of(loss, self.heads)
        weight = self.task_weight() if head is None else float(head not in self.idle)
        return weight * unlabeled / (labeled + weight * unlabeled)

    def learned(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of which unlabelled images have a share."""
        return {name: x for name, x in losses.items() if self.share(name, 1, 1) > 0}

    def with_labels(
        self,
        inputs: list[dict[str, Any]],
        known: NetworkOutputs | None = None,
    ) -> list[dict[str, Any]]:
        """Return the images with labels for the student's forward, and log the number of objects.

        Args:
            inputs: ``batched_inputs`` without labels.
            known: outputs of the teacher with its detections; None if it was not asked.
        """
        if self.ignore_value is not None:
            return [{**x, "sem_seg": self._ignored(x["image"])} for x in inputs]
        if self.pseudo is None or known is None:
            return inputs
        sizes = [tuple(x["image"].shape[-2:]) for x in inputs]
        truth = self.pseudo(known.detections, sizes, known.batch.padded_size)
        if has_event_storage():
            counts = [len(x) for x in truth]
            get_event_storage().put_scalars(
                **{
                    "unlabeled/objects_per_image": sum(counts) / len(counts),
                    "unlabeled/images_without_objects": counts.count(0) / len(counts),
                }
            )
        return [{**x, "instances": y} for x, y in zip(inputs, truth)]

    def _ignored(self, image: Tensor) -> Tensor:
        return torch.full(image.shape[-2:], self.ignore_value)  # type: ignore[arg-type]


@contextmanager
def unlogged(student: nn.Module) -> Iterator[None]:
    """Let a student run without a trace in the log and in its loss normalizer.

    The normalizer of RetinaNet and FCOS is a moving average over labelled images. Statistics of
    batch normalisation follow all images.
    """
    state = StudentState(student)
    numbers = state.state_dict()
    try:
        with EventStorage(current_iteration()):
            yield
    finally:
        state.load_state_dict(numbers)


def is_unlabeled(image: Any) -> bool:
    """Return True for an entry of ``batched_inputs`` of ``DATASETS.UNLABELED``."""
    return isinstance(image, dict) and bool(image.get(UNLABELED))


def unlabeled_of(model: nn.Module) -> Unlabeled | None:
    """Return what the student of a model learns from unlabelled images, or None."""
    found = getattr(model, "unlabeled", None)
    return found if isinstance(found, Unlabeled) else None


def build_unlabeled(
    cfg: CfgNode,
    infos: Mapping[str, tuple[NetworkInfo, NetworkInfo | None]],
    heads: nn.ModuleDict,
) -> Unlabeled | None:
    """Return what the student learns from ``DATASETS.UNLABELED``; None without such images.

    Args:
        cfg: the whole config.
        infos: student and teacher by the teacher's name. The first teacher that detects objects of
            the student's classes makes the labels.
        heads: heads by name.

    Raises:
        ConfigError: nothing can be learned, or labels that the config asks for cannot be made.
    """
    if not cfg.DATASETS.UNLABELED:
        return None
    pairs = {name: (own, x) for name, (own, x) in infos.items() if x is not None}
    problems = {name: _detections_problem(*pair) for name, pair in pairs.items()}
    labeller = next((name for name, problem in problems.items() if problem is None), None)
    pseudo = None if labeller is None else _build_pseudo(cfg, *pairs[labeller])
    problem = "" if pseudo else next(iter(problems.values()))
    weight = cfg.MODEL.DISTILL.UNLABELED.WEIGHT
    if weight and not pseudo:
        raise ConfigError(f"{KEY}.WEIGHT is {weight}, but {problem}; set it to 0.")
    idle = frozenset(name for name, x in heads.items() if _is_idle(x, pseudo))
    if len(idle) == len(heads):
        raise ConfigError(
            f"DATASETS.UNLABELED is {tuple(cfg.DATASETS.UNLABELED)}, but {problem}, and all of "
            f"{tuple(heads)} need labels; empty it, or name a head such as FitNet or CWD."
        )
    if idle:
        logger.warning(
            "DATASETS.UNLABELED does not train %s: they have no teacher%s",
            *(", ".join(sorted(idle)), f" or {problem}" if problem else ""),
        )
    student, _ = next(iter(pairs.values()))
    return Unlabeled(
        heads=tuple(heads),
        idle=idle,
        pseudo=pseudo,
        teacher=labeller or "",
        ignore_value=None if student.has_boxes else cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        weight=weight,
        warmup_iters=cfg.MODEL.DISTILL.UNLABELED.WARMUP_ITERS,
    )


def _detections_problem(student: NetworkInfo, teacher: NetworkInfo) -> str | None:
    """Return why a teacher's detections cannot be the student's ground truth, or None."""
    if not student.has_boxes:
        return f"a {student.kind} trains on no boxes"
    if "detections" not in teacher.outputs:
        return f"the teacher ({teacher.kind}) predicts no detections"
    return no_shared_class(student.classes, teacher.detection_classes)


def _build_pseudo(cfg: CfgNode, student: NetworkInfo, teacher: NetworkInfo) -> PseudoLabels:
    weight = cfg.MODEL.DISTILL.UNLABELED.WEIGHT
    if weight and cfg.MODEL.MASK_ON and not teacher.detects_masks:
        raise ConfigError(
            f"{KEY}.WEIGHT is {weight}, but the teacher ({teacher.kind}) detects no masks, on "
            "which the student trains; set WEIGHT to 0, or MODEL.MASK_ON to False."
        )
    scores, number = list(cfg.MODEL.DISTILL.UNLABELED.SCORE), len(student.classes)
    if len(scores) not in (1, number):
        raise ConfigError(
            f"{KEY}.SCORE has {len(scores)} numbers; give one, or one for each of the student's "
            f"{number} classes."
        )
    scores *= number if len(scores) == 1 else 1
    names = student.classes, teacher.detection_classes
    selection = TeacherInstances(min(scores), *names)
    return PseudoLabels(selection, scores, cfg.MODEL.MASK_ON, teacher.scale)


def _is_idle(head: Any, pseudo: PseudoLabels | None) -> bool:
    return not head.needs_teacher or (head.reads_labels and pseudo is None)
