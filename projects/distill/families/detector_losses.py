"""A detector's own losses on other maps than those of its backbone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch import PanopticFPN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..structures import Batch
from ..utils.training import current_iteration


class DetectorLosses:
    """A detector's own losses on other maps than those of its backbone.

    Calling it leaves no trace in the detector, see :func:`no_side_effects`. A copy of a whole
    model refers to the copied detector.

    Args:
        detector: a dense detector or an R-CNN with an RPN.
    """

    def __init__(self, detector: Any):
        self.detector = detector

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the maps that the detector's heads read, finest first."""
        detector = self.detector
        if isinstance(detector, DenseDetector):
            names = set(detector.head_in_features)
        else:
            parts = [detector.proposal_generator, detector.roi_heads]
            parts += [detector.sem_seg_head] if isinstance(detector, PanopticFPN) else []
            names = {name for part in parts for name in part.in_features}
        shapes = detector.backbone.output_shape()
        return tuple(sorted(names, key=lambda name: (shapes[name].stride, name)))

    def __call__(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return losses by name.

        Args:
            features: (N, C, H, W) maps by the names in :attr:`levels`.
            batch: ground truth.
        """
        with no_side_effects(self.detector, next(iter(features.values())).device):
            return detection_losses(self.detector, features, batch)


def detection_losses(detector: Any, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return the losses of a detector's heads in training mode; see :class:`DetectorLosses`."""
    sizes = [tuple(x["image"].shape[-2:]) for x in batch.inputs]
    some = next(iter(features.values()))
    pixels = some.new_empty(len(sizes), 0, *batch.padded_size)  # only its size is read
    images = ImageList(pixels, sizes)
    if isinstance(detector, DenseDetector):
        maps = [features[name] for name in detector.head_in_features]
        return detector.forward_training(images, maps, detector.head(maps), batch.instances)
    proposals, losses = detector.proposal_generator(images, features, batch.instances)
    losses = {**losses, **detector.roi_heads(images, features, proposals, batch.instances)[1]}
    if isinstance(detector, PanopticFPN):
        head = detector.sem_seg_head
        losses |= head(features, _labels(detector, features, batch))[1]
    return losses


def _labels(detector: PanopticFPN, features: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return the semantic labels, padded to the pixels of the maps, which may have padding."""
    head, labels = detector.sem_seg_head, batch.sem_seg
    name = head.in_features[0]
    stride = detector.backbone.output_shape()[name].stride
    down, right = (
        n * stride - size for n, size in zip(features[name].shape[-2:], labels.shape[-2:])
    )
    padded = F.pad(labels, (0, right, 0, down), value=-1)
    return padded.where(padded >= 0, head.ignore_value)


@contextmanager
def no_side_effects(detector: Any, device: torch.device) -> Iterator[None]:
    """Let parts of a detector run in training mode without a trace.

    Its loss normalizer, its running statistics, the global random state and the log stay as they
    are.

    Args:
        detector: the student after its own forward, or the teacher.
        device: the one that it runs on.
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
            for norm in norms:  # detectron2's NaiveSyncBatchNorm reads only the momentum
                norm.track_running_stats, norm.momentum = False, 0.0
            yield
        finally:
            for module in idle:
                module.training = False
            for norm, (tracked, momentum) in zip(norms, tracking):
                norm.track_running_stats, norm.momentum = tracked, momentum
            if normalizer is not None:
                detector.loss_normalizer = normalizer
