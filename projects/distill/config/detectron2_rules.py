"""What the values of config keys may be, those of this package and of detectron2 alike.

detectron2 checks few of its own values, and some of those in the middle of a training.
"""

import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode

from ..errors import ConfigError
from ..heads.authors import AUTO, VALUES
from ..heads.ima import IMA_SCOPES
from ..heads.mssd import MSSD_MASKS
from ..losses import TID_AREAS, TID_SCORES
from ..utils.text import choices, similar
from .detectron2_values import NAMES, channels


class Rule(NamedTuple):
    """A condition on a value."""

    holds: Callable[[Any], bool]  # if it raises, the value is of a wrong type
    text: str  # what a value must be

    def allows(self, value: Any) -> bool:
        try:
            return self.holds(value)
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ):
            return False


def _at_least(minimum: int) -> Rule:
    return Rule(lambda x: x >= minimum, f"at least {minimum}")


def _list_of(rule: Rule, least: int = 1, most: int | None = None) -> Rule:
    """The rule of a list of numbers.

    Args:
        rule: of each number.
        least, most: of them; None: any number.
    """
    number = f"{least} numbers" if least == most else "a list of numbers"
    return Rule(
        lambda x: (
            least <= len(x) <= (most or len(x))
            and all(_is_number(k) for k in x)
            and all(map(rule.allows, x))
        ),
        f"{number}, each {rule.text}",
    )


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _is_ordinary(value: Any) -> bool:
    """Whether all numbers inside are finite, and none is larger than torch can hold."""
    if isinstance(value, list | tuple):
        return all(map(_is_ordinary, value))
    if isinstance(value, float):
        return abs(value) <= torch.finfo(torch.float32).max  # NaN is not
    return not isinstance(value, int) or abs(value) < 2**63


def _is_rising(values: Iterable[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _is_anchors(value: Any) -> bool:
    levels = value if isinstance(value[0], list | tuple) else [value]
    return all(map(_list_of(_POSITIVE).allows, levels))


def is_writable(folder: str) -> bool:
    """Whether files can be written to a folder, which is made if it is missing."""
    path = os.path.abspath(folder)
    while folder:
        try:
            return stat.S_ISDIR(os.stat(path).st_mode) and os.access(path, os.W_OK)
        except FileNotFoundError:
            path = os.path.dirname(path)
        except OSError:
            return False
    return False


_ORDINARY = Rule(_is_ordinary, "finite, and no larger than torch's numbers")
_POSITIVE = Rule(lambda x: x > 0, "above 0")
_FRACTION = Rule(lambda x: 0 <= x <= 1, "in [0, 1]")
_BELOW_1 = Rule(lambda x: 0 <= x < 1, "in [0, 1)")
_SHARE = Rule(lambda x: 0 < x <= 1, "in (0, 1]")
_SHARE_OF_POINTS = Rule(lambda x: 1e-6 <= x <= 1, "in (0, 1], and at least 0.000001")
_WHOLE = Rule(lambda x: isinstance(x, int) and x >= 0, "a whole number")
_CELLS = Rule(
    lambda x: len(x) > 0 and all(_WHOLE.holds(k) and 0 < k < 2**31 for k in x),
    "whole numbers from 1",
)
_THREE_CELLS = Rule(lambda x: _CELLS.holds(x) and len(x) == 3, "three whole numbers from 1")
_PIXELS = Rule(
    lambda x: len(x) == 2 and _CELLS.holds(x), "a height and a width, whole numbers from 1"
)
_STEPS = Rule(
    lambda x: all(_WHOLE.holds(k) and k > 0 for k in x) and _is_rising(x),
    "rising whole numbers from 1",
)
_THRESHOLDS = Rule(
    lambda x: _list_of(_SHARE).holds(x) and _is_rising(x), "rising numbers in (0, 1]"
)
_BOX_WEIGHTS = _list_of(_POSITIVE, 4, 4)
_ANCHORS = Rule(_is_anchors, "numbers above 0, or a list of such numbers for each level")
_TEXTS = Rule(lambda x: all(isinstance(k, str) for k in x), "a list of texts")

# By patterns of keys. Every rule whose pattern fits a key has to hold.
_RULES: dict[str, Rule] = {
    "OUTPUT_DIR": Rule(is_writable, "a folder that can be written to"),
    "SEED": Rule(lambda x: x < 2**31, "below 2^31"),
    "VIS_PERIOD": _at_least(0),
    "DATALOADER.NUM_WORKERS": _at_least(0),
    "DATALOADER.RANDOM_SUBSET_RATIO": _SHARE,
    "DATALOADER.REPEAT_THRESHOLD": _FRACTION,
    "DATALOADER.TIMEOUT": _at_least(0),
    "DATASETS.TRAIN_REPEAT_FACTOR": Rule(
        lambda x: all(isinstance(name, str) and factor > 0 for name, factor in x),
        "a list of [data set, factor above 0]",
    ),
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": _SHARE,
    "INPUT.CROP.SIZE": _list_of(_POSITIVE, 2, 2),
    "INPUT.MAX_SIZE_*": _at_least(1),
    "INPUT.MIN_SIZE_TEST": _at_least(0),  # 0: as it is
    "INPUT.MIN_SIZE_TRAIN": _list_of(_WHOLE),
    "MODEL.PIXEL_MEAN": _list_of(_ORDINARY),
    "MODEL.PIXEL_STD": _list_of(_POSITIVE),
    "MODEL.*OUT_CHANNELS": _at_least(1),
    "MODEL.*_DIM": _at_least(1),
    "MODEL.*_WEIGHT": _at_least(0),
    "MODEL.*.BATCH_SIZE_PER_IMAGE": _at_least(1),
    "MODEL.*.ANCHOR_SIZE": _POSITIVE,
    "MODEL.*.CANDIDATES": _at_least(1),
    "MODEL.*.FOCAL_LOSS_GAMMA": _at_least(0),
    "MODEL.*.IOUS": _THRESHOLDS,
    "MODEL.*.IOU_THRESHOLDS": _THRESHOLDS,
    "MODEL.*.NMS_THRESH*": _FRACTION,
    "MODEL.*.NUM_CLASSES": _at_least(1),
    "MODEL.*.NUM_CONV": _at_least(0),
    "MODEL.*.NUM_CONVS": _at_least(1),
    "MODEL.*.NUM_FC": _at_least(0),
    "MODEL.*.POOLER_RESOLUTION": _at_least(1),
    "MODEL.*.POOLER_SAMPLING_RATIO": _at_least(0),
    "MODEL.*.POSITIVE_FRACTION": _FRACTION,
    "MODEL.*.PRIOR_PROB": Rule(lambda x: 0 < x < 1, "in (0, 1)"),
    "MODEL.*.TOPK_CANDIDATES_TEST": _at_least(1),
    "MODEL.*SMOOTH_L1*BETA": _at_least(0),
    "MODEL.ANCHOR_GENERATOR.SIZES": _ANCHORS,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _ANCHORS,
    "MODEL.ATSS.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.DISTILL.COSINE_PERIOD": _at_least(0),
    "MODEL.DISTILL.HEADS": _TEXTS,
    "MODEL.DISTILL.INHERIT": _TEXTS,
    "MODEL.DISTILL.TEACHER.CLASSES": _TEXTS,
    "MODEL.DISTILL.*.IN_FEATURES": _TEXTS,
    "MODEL.DISTILL.*_ITER": _at_least(0),
    "MODEL.DISTILL.*_ITERS": _at_least(0),
    "MODEL.DISTILL.*.MASK_RATIO": _BELOW_1,
    "MODEL.DISTILL.*TEMPERATURE": _POSITIVE,
    "MODEL.DISTILL.*.THRESHOLD": _FRACTION,
    "MODEL.DISTILL.*.WEIGHT": _at_least(0),
    "MODEL.DISTILL.CIRKD.*KEYS": _at_least(1),
    "MODEL.DISTILL.CIRKD.*PIXELS": _at_least(1),
    "MODEL.DISTILL.CIRKD.*_WEIGHT": _at_least(0),
    "MODEL.DISTILL.CIRKD.POOL": _at_least(1),
    "MODEL.DISTILL.CIRKD.REGIONS": _at_least(1),
    "MODEL.DISTILL.CROSSKD.REUSED_CONVS": _WHOLE,
    "MODEL.DISTILL.DKD.ALPHA": _at_least(0),
    "MODEL.DISTILL.DKD.BETA": _at_least(0),
    "MODEL.DISTILL.FGD.ALPHA": _at_least(0),
    "MODEL.DISTILL.FGD.BETA": _at_least(0),
    "MODEL.DISTILL.FGD.GAMMA": _at_least(0),
    "MODEL.DISTILL.FGD.LAMBDA": _at_least(0),
    "MODEL.DISTILL.IMA.SCALE_FLOOR": _FRACTION,
    "MODEL.DISTILL.MASKD*.TOKENS": _at_least(1),
    "MODEL.DISTILL.MKD.SCALES": _CELLS,
    "MODEL.DISTILL.MSSD.GAMMA": _SHARE,
    "MODEL.DISTILL.MSSD.SIGMA2": _POSITIVE,
    "MODEL.DISTILL.SKD.SCALE": _SHARE,
    "MODEL.DISTILL.TID.ALPHA_*": _at_least(0),
    "MODEL.DISTILL.TID.GAMMA": _SHARE_OF_POINTS,
    "MODEL.DISTILL.TID.NMS_IOU": _FRACTION,
    "MODEL.DISTILL.TID.TOP": _SHARE_OF_POINTS,
    "MODEL.FCOS.CENTER_SAMPLING_RADIUS": _POSITIVE,
    "MODEL.GFL.QFL_BETA": _at_least(0),
    "MODEL.GFL.REG_MAX": _at_least(1),
    "MODEL.RESNETS.NUM_GROUPS": _at_least(1),
    "MODEL.RESNETS.RES4_DILATION": Rule(lambda x: x in (1, 2), "1 or 2"),
    "MODEL.RESNETS.RES5_DILATION": Rule(lambda x: x in (1, 2, 4), "1, 2 or 4"),
    "MODEL.RESNETS.RES5_MULTI_GRID": _THREE_CELLS,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _at_least(1),
    "MODEL.REPPOINTS.IOU_THRESHOLDS": _list_of(_SHARE, 2, 2),
    "MODEL.REPPOINTS.POINTS_PER_OBJECT": _at_least(1),
    "MODEL.REPPOINTS.POINT_SCALE": _POSITIVE,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": Rule(
        lambda x: all(map(_BOX_WEIGHTS.allows, x)), "a list of 4 numbers above 0 for each stage"
    ),
    "MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RPN.CONV_DIMS": _list_of(Rule(lambda x: x == -1 or x >= 1, "-1 or at least 1")),
    "MODEL.RPN.*_NMS_TOPK_*": _at_least(1),
    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": _at_least(1),
    "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS": _THREE_CELLS,
    "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT": _BELOW_1,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": _at_least(1),
    "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS": _CELLS,
    "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES": _TEXTS,
    "MODEL.TIMM.OUT_INDICES": Rule(lambda x: all(map(_WHOLE.holds, x)), "whole numbers"),
    "SOLVER.*_FACTOR": _at_least(0),
    "SOLVER.*_ITERS": _at_least(0),
    "SOLVER.BASE_LR*": _at_least(0),
    "SOLVER.CHECKPOINT_PERIOD": _at_least(1),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _POSITIVE,
    "SOLVER.EMA.DECAY": _BELOW_1,
    "SOLVER.FLAT_FRACTION": _BELOW_1,
    "SOLVER.GAMMA": _at_least(0),
    "SOLVER.IMS_PER_BATCH": _at_least(1),
    "SOLVER.KEEP_CHECKPOINTS": _at_least(0),
    "SOLVER.MAX_ITER": _at_least(1),
    "SOLVER.MAX_SKIPS": _at_least(0),
    "SOLVER.MOMENTUM": _FRACTION,
    "SOLVER.NUM_DECAYS": _at_least(1),
    "SOLVER.POLY_LR_CONSTANT_ENDING": _FRACTION,
    "SOLVER.POLY_LR_POWER": _at_least(0),
    "SOLVER.REFERENCE_WORLD_SIZE": _at_least(0),
    "SOLVER.STEPS": _STEPS,
    "SOLVER.WEIGHT_DECAY": _at_least(0),
    "SOLVER.WEIGHT_DECAY_BIAS": Rule(
        lambda x: x is None or (_is_number(x) and x >= 0), "None or at least 0"
    ),
    "SOLVER.WEIGHT_DECAY_NORM": _at_least(0),
    "TEST.AUG.MAX_SIZE": _at_least(1),
    "TEST.AUG.MIN_SIZES": _CELLS,
    "TEST.EXPECTED_RESULTS": Rule(
        lambda x: all(_TEXTS.holds(k[:2]) and _list_of(_ORDINARY, 2, 2).holds(k[2:]) for k in x),
        "a list of [task, metric, value, tolerance]",
    ),
    "TEST.EVAL_PERIOD": _at_least(0),
    "TEST.PRECISE_BN.NUM_ITER": _at_least(1),
    "TEST.SLIDING_WINDOW.CROP_SIZE": _PIXELS,
    "TEST.SLIDING_WINDOW.STRIDE": _PIXELS,
}
_BY_AUTHORS = {
    f"MODEL.DISTILL.{head.upper()}.{key}" for head, keys in VALUES.items() for key in keys
}
_INFINITE_TOO = ("SOLVER.CLIP_GRADIENTS.NORM_TYPE",)  # the largest entry is a norm
_CHOICES: dict[str, tuple[str, ...]] = {
    "DATALOADER.ON_BAD_IMAGE": ("stop", "drop"),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    "MODEL.DISTILL.IMA.SCOPE": IMA_SCOPES,
    "MODEL.DISTILL.IMA.SCALE_ON": ("standardized", "raw"),
    "MODEL.DISTILL.MSSD.MASK": MSSD_MASKS,
    "MODEL.DISTILL.TID.SCORE": TID_SCORES,
    "MODEL.DISTILL.TID.AREA": TID_AREAS,
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE": ("cross_entropy", "hard_pixel_mining"),
    "SOLVER.ON_NONFINITE": ("stop", "skip"),
    "SOLVER.OPTIMIZER": ("SGD", "ADAMW"),
}
# Conditions on several keys, and what to say if one does not hold.
_TOGETHER: tuple[tuple[Callable[[CfgNode], bool], str], ...] = (
    (
        lambda c: {name for name, _ in c.DATASETS.TRAIN_REPEAT_FACTOR} <= {*c.DATASETS.TRAIN},
        "DATASETS.TRAIN_REPEAT_FACTOR is {c.DATASETS.TRAIN_REPEAT_FACTOR}; it may only have data "
        "sets of DATASETS.TRAIN {c.DATASETS.TRAIN}.",
    ),
    (
        lambda c: c.SOLVER.IMS_PER_BATCH % max(c.SOLVER.REFERENCE_WORLD_SIZE, 1) == 0,
        "SOLVER.IMS_PER_BATCH is {c.SOLVER.IMS_PER_BATCH}; it must be a multiple of "
        "SOLVER.REFERENCE_WORLD_SIZE {c.SOLVER.REFERENCE_WORLD_SIZE}.",
    ),
    (
        lambda c: not (c.TEST.PRECISE_BN.ENABLED and c.SOLVER.EMA.DECAY),
        "TEST.PRECISE_BN.ENABLED is True, which corrects the trained weights' statistics, but "
        "SOLVER.EMA.DECAY is {c.SOLVER.EMA.DECAY} and their average is evaluated; switch one off.",
    ),
    (
        lambda c: c.SOLVER.MAX_ITER not in c.SOLVER.STEPS,
        "SOLVER.STEPS is {c.SOLVER.STEPS}; no step may be at SOLVER.MAX_ITER {c.SOLVER.MAX_ITER}.",
    ),
    (
        lambda c: (
            c.SOLVER.LR_SCHEDULER_NAME not in ("WarmupCosineLR", "WarmupFlatCosineLR")
            or c.SOLVER.BASE_LR_END <= c.SOLVER.BASE_LR != 0
        ),
        "SOLVER.BASE_LR_END is {c.SOLVER.BASE_LR_END}; {c.SOLVER.LR_SCHEDULER_NAME} "
        "needs it to be at most SOLVER.BASE_LR {c.SOLVER.BASE_LR}, and that to be above 0.",
    ),
    (
        lambda c: not c.SOLVER.NESTEROV or c.SOLVER.OPTIMIZER != "SGD" or c.SOLVER.MOMENTUM > 0,
        "SOLVER.NESTEROV is True, which needs a SOLVER.MOMENTUM above 0.",
    ),
    (
        lambda c: (
            c.INPUT.MIN_SIZE_TRAIN_SAMPLING != "range"
            or (
                c.INPUT.MIN_SIZE_TRAIN[0] <= c.INPUT.MIN_SIZE_TRAIN[-1]
                and len(c.INPUT.MIN_SIZE_TRAIN) == 2
            )
        ),
        "INPUT.MIN_SIZE_TRAIN is {c.INPUT.MIN_SIZE_TRAIN}; INPUT.MIN_SIZE_TRAIN_SAMPLING range "
        "needs the smallest and the largest size.",
    ),
    (
        lambda c: not c.INPUT.CROP.ENABLED or _is_crop(c.INPUT.CROP.TYPE, *c.INPUT.CROP.SIZE),
        "INPUT.CROP.SIZE is {c.INPUT.CROP.SIZE}; of type {c.INPUT.CROP.TYPE} it must be fractions "
        "in (0, 1] if relative, else whole numbers of pixels.",
    ),
    (
        lambda c: len(c.MODEL.PIXEL_MEAN) == len(c.MODEL.PIXEL_STD) == channels(c.INPUT.FORMAT),
        "MODEL.PIXEL_MEAN is {c.MODEL.PIXEL_MEAN} and MODEL.PIXEL_STD {c.MODEL.PIXEL_STD}; they "
        "must have one number per channel of INPUT.FORMAT {c.INPUT.FORMAT}.",
    ),
    (
        lambda c: (
            "PanopticFPN" not in (c.MODEL.META_ARCHITECTURE, c.MODEL.DISTILL.STUDENT_ARCHITECTURE)
            or c.MODEL.MASK_ON
            or not c.MODEL.PANOPTIC_FPN.COMBINE.ENABLED
        ),
        "MODEL.MASK_ON is False, but PanopticFPN combines masks; set it True, or "
        "MODEL.PANOPTIC_FPN.COMBINE.ENABLED False.",
    ),
    (
        lambda c: c.MODEL.RESNETS.RES4_DILATION == 1 or c.MODEL.RESNETS.RES5_DILATION == 4,
        "MODEL.RESNETS.RES5_DILATION is {c.MODEL.RESNETS.RES5_DILATION}; with a RES4_DILATION of 2 "
        "it must be 4.",
    ),
    (
        lambda c: (
            c.MODEL.SEM_SEG_HEAD.NAME != "DeepLabV3Head"
            or c.MODEL.SEM_SEG_HEAD.CONVS_DIM == c.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS
        ),
        "MODEL.SEM_SEG_HEAD.CONVS_DIM is {c.MODEL.SEM_SEG_HEAD.CONVS_DIM}; DeepLabV3Head needs it "
        "to be its ASPP_CHANNELS {c.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS}.",
    ),
    (
        lambda c: _has_output_stride(c),
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {c.MODEL.SEM_SEG_HEAD.COMMON_STRIDE}; DeepLabV3Head "
        "needs the backbone's output stride, by RES4_DILATION and RES5_DILATION 32, 16 or 8.",
    ),
    (
        lambda c: all(
            map(int.__le__, c.TEST.SLIDING_WINDOW.STRIDE, c.TEST.SLIDING_WINDOW.CROP_SIZE)
        ),
        "TEST.SLIDING_WINDOW.STRIDE is {c.TEST.SLIDING_WINDOW.STRIDE}; it must be at most its "
        "CROP_SIZE {c.TEST.SLIDING_WINDOW.CROP_SIZE}, or pixels would lie between the windows.",
    ),
    *(
        (
            lambda c, head=head: head not in c.MODEL.DISTILL.HEADS or _masks_distil(c, head),
            f"MODEL.DISTILL.{head.upper()}.TOKEN_ITERS is "
            f"{{c.MODEL.DISTILL.{head.upper()}.TOKEN_ITERS}}, and the masks distil from there on; "
            "lower it below SOLVER.MAX_ITER {c.SOLVER.MAX_ITER} and STOP_ITER.",
        )
        for head in ("MasKD", "MasKDLogits")
    ),
    (
        lambda c: (
            "CIRKD" not in c.MODEL.DISTILL.HEADS
            or (
                c.SOLVER.IMS_PER_BATCH * c.MODEL.DISTILL.CIRKD.NEW_PIXELS
                <= c.MODEL.DISTILL.CIRKD.PIXELS
                and c.SOLVER.IMS_PER_BATCH <= c.MODEL.DISTILL.CIRKD.REGIONS
            )
        ),
        "SOLVER.IMS_PER_BATCH is {c.SOLVER.IMS_PER_BATCH}, of which a step stores more than "
        "MODEL.DISTILL.CIRKD.PIXELS {c.MODEL.DISTILL.CIRKD.PIXELS} or REGIONS "
        "{c.MODEL.DISTILL.CIRKD.REGIONS} hold; raise them or lower NEW_PIXELS.",
    ),
    (
        lambda c: c.MODEL.DEVICE != "cpu" or not any(c.MODEL.RESNETS.DEFORM_ON_PER_STAGE),
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE is {c.MODEL.RESNETS.DEFORM_ON_PER_STAGE}; "
        "detectron2's deformable convolution needs a GPU, but MODEL.DEVICE is cpu.",
    ),
)


def _masks_distil(cfg: CfgNode, head: str) -> bool:
    """Whether iterations are left after the tokens were learned."""
    section = cfg.MODEL.DISTILL[head.upper()]
    last = min(section.STOP_ITER or math.inf, cfg.SOLVER.MAX_ITER)
    return last > section.TOKEN_ITERS


def _has_output_stride(cfg: CfgNode) -> bool:
    """Whether DeepLabV3Head enlarges its logits to the size of the labels; true of other heads."""
    head, resnet = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.RESNETS
    if head.NAME != "DeepLabV3Head" or "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return True
    stride = 8 * (3 - resnet.RES4_DILATION) * (1 + (resnet.RES5_DILATION == 1))
    return list(head.IN_FEATURES) != ["res5"] or stride == head.COMMON_STRIDE


def _is_crop(kind: str, first: float, second: float) -> bool:
    if kind.startswith("relative"):
        return max(first, second) <= 1
    whole = first >= 1 and first == int(first) and second == int(second)
    return whole and (kind == "absolute" or first <= second)


def check_values(cfg: CfgNode) -> None:
    """Check the values of a config, each by itself and some together.

    Raises:
        ConfigError: names the key, its value, and what it may be.
    """
    for key, value in leaves(cfg):
        if key in _CHOICES:
            check_choice(key, value, _CHOICES[key])
        if key in NAMES and not NAMES[key].accepts(value):
            check_choice(key, value, NAMES[key].listed)
        for rule in _rules(key):
            if not rule.allows(value) and not (key in _BY_AUTHORS and value == AUTO):
                authors = f", or {AUTO:g} for the authors' value" * (key in _BY_AUTHORS)
                raise ConfigError(f"{key} is {value!r:.200}; it must be {rule.text}{authors}.")
    for fit, sentence in _TOGETHER:
        if not fit(cfg):
            raise ConfigError(sentence.format(c=cfg))


@cache
def _rules(key: str) -> tuple[Rule, ...]:
    found = [rule for pattern, rule in _RULES.items() if fnmatchcase(key, pattern)]
    return tuple(found if key in _INFINITE_TOO else [_ORDINARY, *found])


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_choice(key: str, value: Any, valid: Iterable[str]) -> None:
    """Raises ConfigError if a value is none of the valid names, which it lists, nearest first."""
    names = list(valid)
    if value not in names:
        near = similar(str(value), names)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"{key}: unknown value '{value}'{hint} Valid: {nearest(value, names)}.")


def nearest(value: Any, valid: Iterable[str], most: int = 12) -> str:
    """The valid names for a message, at most so many."""
    names = choices(str(value), valid).split(", ")
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
