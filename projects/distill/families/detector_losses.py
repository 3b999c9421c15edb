"""Detection losses on other maps than those of the backbone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.modeling.meta_arch import PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..structures import Batch
from ..utils.training import current_iteration


def detected_levels(detector: Any) -> set[str]:
    """Names of the maps that a detector's head reads."""
    if isinstance(detector, DenseDetector):
        return set(detector.head_in_features)
    parts = [detector.proposal_generator, detector.roi_heads]
    parts += [detector.sem_seg_head] if isinstance(detector, PanopticFPN) else []
    return {name for part in parts for name in part.in_features}


def detection_losses(detector: Any, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """What a detector's head loses on other maps than those of its backbone.

    Args:
        detector: under :func:`unnoticed`.
        features: (N, C, H, W) maps by the names that the head reads.
        batch: ground truth.
    """
    sizes = [tuple(x["image"].shape[-2:]) for x in batch.inputs]
    pixels = next(iter(features.values())).new_empty(
        len(sizes), 0, *batch.padded_size
    )  # nobody looks
    images = ImageList(pixels, sizes)
    if isinstance(detector, DenseDetector):
        maps = [features[name] for name in detector.head_in_features]
        return detector.forward_training(images, maps, detector.head(maps), batch.instances)
    proposals, losses = detector.proposal_generator(images, features, batch.instances)
    losses = {**losses, **detector.roi_heads(images, features, proposals, batch.instances)[1]}
    if isinstance(detector, PanopticFPN):
        head = detector.sem_seg_head
        labels = batch.sem_seg.where(batch.sem_seg >= 0, head.ignore_value)
        losses |= head(features, labels)[1]
    return losses


@contextmanager
def no_side_effects(detector: Any, device: torch.device) -> Iterator[None]:
    """Run parts of a detector for their losses, and leave no trace: neither in its loss normalizer
    and running statistics, nor in the global random state, nor in the log.

    Args:
        detector: the student, whose forward was before, or the teacher, whose norms stay as they
            are.
        device: it runs on.
    """
    # detectron2's heads return losses in training only.
    idle = [x for x in detector.modules() if not x.training and not isinstance(x, _BatchNorm)]
    norms = [x for x in detector.modules() if isinstance(x, _BatchNorm)]
    tracking = [(x.track_running_stats, x.momentum) for x in norms]
    normalizer = getattr(detector, "loss_normalizer", None)  # RetinaNet's and FCOS's average
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), EventStorage(current_iteration()):
        try:
            for module in idle:
                module.training = True
            for norm in norms:  # detectron2's NaiveSyncBatchNorm reads the momentum alone
                norm.track_running_stats, norm.momentum = False, 0.0
            yield
        finally:
            for module in idle:
                module.training = False
            for norm, (tracked, momentum) in zip(norms, tracking):
                norm.track_running_stats, norm.momentum = tracked, momentum
            if normalizer is not None:
                detector.loss_normalizer = normalizer
