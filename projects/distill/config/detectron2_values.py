"""Config values that are names in detectron2's own code.

detectron2 compares them with texts in the function that reads the key. So a value is valid if the
installed version has it there, whether or not it stands in the lists below, which are for messages.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from detectron2.data.build import _train_loader_from_config
from detectron2.data.detection_utils import (
    annotations_to_instances,
    build_augmentation,
    convert_PIL_to_numpy,
)
from detectron2.data.transforms import RandomCrop, ResizeShortestEdge
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.projects.deeplab.resnet import build_resnet_deeplab_backbone
from detectron2.solver import WarmupParamScheduler, build_lr_scheduler
from detectron2.solver.build import GradientClipType
from PIL import Image


class Names(NamedTuple):
    """Values of a key of detectron2."""

    listed: tuple[str, ...]  # for messages
    accepts: Callable[[Any], bool]  # whether the installed detectron2 knows a value


@cache
def texts_in(function: Callable[..., Any]) -> frozenset[str]:
    """Return the texts in the code of a function, its docstring and messages included."""
    constants = inspect.unwrap(function).__code__.co_consts
    groups = [x if isinstance(x, tuple | frozenset) else (x,) for x in constants]
    return frozenset(x for group in groups for x in group if isinstance(x, str))


def _named_in(function: Callable[..., Any]) -> Callable[[Any], bool]:
    return lambda value: value in texts_in(function)


@cache
def channels(image_format: str) -> int:
    """Return the number of channels of ``INPUT.FORMAT``; 0 if detectron2 cannot train on it."""
    try:
        array = convert_PIL_to_numpy(Image.new("RGB", (1, 1)), image_format)
    except (KeyError, ValueError, OSError):
        return 0
    return array.shape[2] if array.ndim == 3 else 0


_BOX_LOSSES = Names(("smooth_l1", "giou", "diou", "ciou"), _named_in(_dense_box_regression_loss))
NAMES = {
    "DATALOADER.SAMPLER_TRAIN": Names(
        (
            "TrainingSampler",
            "RepeatFactorTrainingSampler",
            "RandomSubsetTrainingSampler",
            "WeightedTrainingSampler",
            "WeightedCategoryTrainingSampler",
        ),
        _named_in(_train_loader_from_config),
    ),
    "INPUT.CROP.TYPE": Names(
        ("relative", "relative_range", "absolute", "absolute_range"),
        _named_in(RandomCrop.__init__),
    ),
    "INPUT.FORMAT": Names(("BGR", "RGB", "L", "YUV-BT.601"), lambda value: channels(value) > 0),
    "INPUT.MASK_FORMAT": Names(("polygon", "bitmask"), _named_in(annotations_to_instances)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": Names(
        ("choice", "range"), _named_in(ResizeShortestEdge.__init__)
    ),
    "INPUT.RANDOM_FLIP": Names(("horizontal", "vertical", "none"), _named_in(build_augmentation)),
    "MODEL.RESNETS.STEM_TYPE": Names(
        ("basic", "deeplab"), _named_in(build_resnet_deeplab_backbone)
    ),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": Names(
        ("value", "norm"), lambda value: value in [kind.value for kind in GradientClipType]
    ),
    "SOLVER.LR_SCHEDULER_NAME": Names(
        (
            "WarmupMultiStepLR",
            "WarmupCosineLR",
            "WarmupFlatCosineLR",  # ours
            "WarmupStepWithFixedGammaLR",
            "WarmupPolyLR",  # of detectron2's DeepLab
        ),
        _named_in(build_lr_scheduler),
    ),
    "SOLVER.WARMUP_METHOD": Names(("linear", "constant"), _named_in(WarmupParamScheduler.__init__)),
}
