"""Conversion between the pixels of the student and of a teacher that sees another image size.

The scale is ``MODEL.DISTILL.TEACHER.SCALE``: a point at x in the student's padded input is at
``scale * x`` in the teacher's.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from torch import Tensor

from ..structures import Batch, DenseLayout, NetworkInfo, NetworkOutputs

SMALLEST_SIDE = 4  # pixels that are at least one pixel at the smallest scale, 0.25

# ---- Images


def rescaled_size(size: Sequence[int], scale: float) -> tuple[int, ...]:
    """Return the size of a resized image. A part of a pixel is cut, but one pixel stays."""
    return tuple(max(int(x * scale), 1) for x in size)


def rescaled_padding(padded_size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return a padded size, rounded up so that it covers every cell of the student."""
    height, width = (ceil(round(x * scale, 6)) for x in padded_size)
    return height, width


def rescaled_image(image: Tensor, scale: float) -> Tensor:
    """Return a (C, H, W) image resized by exactly ``scale``, without aliasing, as float32.

    The ratio of rounded sizes would shift the far cells.
    """
    height, width = rescaled_size(image.shape[1:], scale)
    missing_y, missing_x = (max(SMALLEST_SIDE - x, 0) for x in image.shape[1:])
    image = F.pad(image[None].float(), (0, missing_x, 0, missing_y), mode="replicate")
    resized = F.interpolate(image, scale_factor=scale, mode="bilinear", antialias=scale < 1)
    return resized[0, :, :height, :width]


# ---- Boxes and ground truth


def rescaled_boxes(outputs: NetworkOutputs, scale: float) -> NetworkOutputs:
    """Return the outputs with all their boxes multiplied by ``scale``."""
    rois = [replace(x, boxes=[b * scale for b in x.boxes]) for x in outputs.rois]
    masks = outputs.masks and replace(outputs.masks, boxes=[b * scale for b in outputs.masks.boxes])
    dense_boxes = [b * scale for b in outputs.dense_boxes]
    found = [rescaled_instances(x, x.image_size, scale) for x in outputs.detections]
    return replace(outputs, rois=rois, masks=masks, dense_boxes=dense_boxes, detections=found)


def rescaled_truth(batch: Batch, scale: float) -> Batch:
    """Return the ground truth of a batch in the teacher's pixels; its images have only a size."""
    inputs = []
    for x in batch.inputs:
        size = rescaled_size(x["image"].shape[1:], scale)
        entry = {"image": x["image"].new_empty(()).expand(len(x["image"]), *size)}
        if "sem_seg" in x:
            entry["sem_seg"] = _nearest(x["sem_seg"][None], size)[0].long()
        inputs.append(entry)
    instances = [
        rescaled_instances(x, tuple(entry["image"].shape[1:]), scale)
        for x, entry in zip(batch.instances, inputs)
    ]
    return Batch(inputs, rescaled_padding(batch.padded_size, scale), instances, batch.device)


def rescaled_instances(instances: Instances, size: tuple[int, ...], scale: float) -> Instances:
    """Return instances of an image of (height, width) ``size`` in the teacher's pixels."""
    fields = {k: _rescaled_field(x, size, scale) for k, x in instances.get_fields().items()}
    return Instances(size, **fields)


def _rescaled_field(x: Any, size: tuple[int, ...], scale: float) -> Any:
    if isinstance(x, Boxes):
        return Boxes(x.tensor * scale)
    if isinstance(x, Keypoints):
        return Keypoints(x.tensor * x.tensor.new_tensor([scale, scale, 1]))  # x, y, visibility
    if isinstance(x, PolygonMasks):
        return PolygonMasks([[p * scale for p in polygons] for polygons in x.polygons])
    if isinstance(x, BitMasks):
        return BitMasks(_nearest(x.tensor, size) > 0)
    return x


def _nearest(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return (N, H, W) labels or masks in another size, as float32."""
    if len(labels) == 0:
        return labels.new_empty((0, *size)).float()
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0]


# ---- Description of the network


def in_student_pixels(info: NetworkInfo, scale: float) -> NetworkInfo:
    """Return a teacher's description with strides and anchors in the student's pixels."""
    if scale == 1:
        return info
    losses = info.detector_losses
    return replace(
        info,
        scale=scale,
        features={name: _effective_shape(x, scale) for name, x in info.features.items()},
        sem_seg=info.sem_seg and _effective_shape(info.sem_seg, scale),
        dense=info.dense and _effective_layout(info.dense, scale),
        detector_losses=losses and partial(_losses_of_student_batch, losses, scale),
    )


def _losses_of_student_batch(
    losses: Any, scale: float, features: dict[str, Tensor], batch: Batch
) -> dict[str, Tensor]:
    return losses(features, rescaled_truth(batch, scale))


def _effective_shape(shape: ShapeSpec, scale: float) -> ShapeSpec:
    return replace(shape, stride=_effective_stride(shape.stride, scale))


def _effective_layout(layout: DenseLayout, scale: float) -> DenseLayout:
    strides = [_effective_stride(x, scale) for x in layout.strides]
    return replace(layout, strides=strides, anchors=[x / scale for x in layout.anchors])


def _effective_stride(stride: Any, scale: float) -> float:
    """Return a stride in the student's pixels, as a whole number if it is one."""
    effective = stride / scale
    return int(effective) if effective.is_integer() else effective
