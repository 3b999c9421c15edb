"""Config values that are names in detectron2's own code.

detectron2 compares them with texts in the function that reads the key. So a value is valid if the
installed version has it there, even if it is not among the names that messages list.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

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

from ..section import Rule, one_of


def named_in(function: Callable[..., Any], *names: str) -> Rule:
    """Return the rule of a key with which detectron2 compares texts.

    Args:
        function: reads the key.
        names: valid values for messages, further ones of this package included.
    """
    return Rule(lambda x: x in names or x in texts_in(function), " | ".join(names), names)


@cache
def texts_in(function: Callable[..., Any]) -> frozenset[str]:
    """Return the texts in the code of a function, its docstring and messages included."""
    constants = inspect.unwrap(function).__code__.co_consts
    groups = [x if isinstance(x, tuple | frozenset) else (x,) for x in constants]
    return frozenset(x for group in groups for x in group if isinstance(x, str))


@cache
def channels(image_format: str) -> int:
    """Return the number of channels of ``INPUT.FORMAT``; 0 if detectron2 cannot train on it."""
    try:
        array = convert_PIL_to_numpy(Image.new("RGB", (1, 1)), image_format)
    except (KeyError, ValueError, OSError):
        return 0
    return array.shape[2] if array.ndim == 3 else 0


_BOX_LOSS = named_in(_dense_box_regression_loss, "smooth_l1", "giou", "diou", "ciou")
_FORMATS = ("BGR", "RGB", "L", "YUV-BT.601")

NAME_RULES: dict[str, Rule] = {
    "DATALOADER.SAMPLER_TRAIN": named_in(
        _train_loader_from_config,
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "RandomSubsetTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ),
    "INPUT.CROP.TYPE": named_in(
        RandomCrop.__init__, "relative", "relative_range", "absolute", "absolute_range"
    ),
    # Pillow's modes with a dimension of channels, too.
    "INPUT.FORMAT": Rule(lambda x: channels(x) > 0, " | ".join(_FORMATS), _FORMATS),
    "INPUT.MASK_FORMAT": named_in(annotations_to_instances, "polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": named_in(ResizeShortestEdge.__init__, "choice", "range"),
    "INPUT.RANDOM_FLIP": named_in(build_augmentation, "horizontal", "vertical", "none"),
    "MODEL.RESNETS.STEM_TYPE": named_in(build_resnet_deeplab_backbone, "basic", "deeplab"),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of(*(kind.value for kind in GradientClipType)),
    "SOLVER.LR_SCHEDULER_NAME": named_in(
        build_lr_scheduler,
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupFlatCosineLR",  # this package has it
        "WarmupStepWithFixedGammaLR",
        "WarmupPolyLR",  # detectron2's DeepLab has it
    ),
    "SOLVER.WARMUP_METHOD": named_in(
        WarmupParamScheduler.__init__,
        "linear",
        "constant",
        "quadratic",  # this package has it
    ),
}
