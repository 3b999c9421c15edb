"""Valid values of detectron2's own config keys.

detectron2 checks few of them, and some of those only in the middle of a training. The keys of this
package have their rules where they are declared (:mod:`distill.section`).
"""

import os
import stat
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..errors import ConfigError
from ..section import (
    BELOW_1,
    BOX_WEIGHTS,
    COUNTS,
    FINITE,
    FRACTION,
    INSIDE_0_1,
    IOU_THRESHOLDS,
    POSITIVE,
    SHARE,
    TEXTS,
    WHOLE,
    Rule,
    at_least,
    is_number,
    is_rising,
    list_of,
    one_of,
)
from .architecture import student_architecture
from .detectron2_values import NAME_RULES, channels


def is_writable(folder: str) -> bool:
    """Return whether a folder is writable, or can be created if it is missing."""
    path = os.path.abspath(folder)
    while folder:
        try:
            return stat.S_ISDIR(os.stat(path).st_mode) and os.access(path, os.W_OK)
        except FileNotFoundError:
            path = os.path.dirname(path)
        except OSError:
            return False
    return False


def _is_anchors(value: Any) -> bool:
    levels = value if isinstance(value[0], list | tuple) else [value]
    return all(map(list_of(POSITIVE).allows, levels))


_ANCHORS = Rule(_is_anchors, "numbers above 0, or a list of such numbers for each level")
_STEPS = Rule(
    lambda x: all(WHOLE.holds(k) and k > 0 for k in x) and is_rising(x),
    "rising whole numbers from 1",
)
_THREE_COUNTS = Rule(lambda x: COUNTS.holds(x) and len(x) == 3, "three whole numbers from 1")

# By patterns of keys. Every rule whose pattern fits a key has to hold.
_RULES: dict[str, Rule] = {
    **NAME_RULES,
    "DATALOADER.NUM_WORKERS": at_least(0),
    "DATALOADER.REPEAT_THRESHOLD": FRACTION,
    "FLOAT32_PRECISION": one_of("", "highest", "high", "medium"),
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": SHARE,
    "INPUT.CROP.SIZE": list_of(POSITIVE, 2, 2),
    "INPUT.MAX_SIZE_*": at_least(1),
    "INPUT.MIN_SIZE_TEST": at_least(0),  # 0: no resizing
    "INPUT.MIN_SIZE_TRAIN": list_of(WHOLE),
    "MODEL.*.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.*.FOCAL_LOSS_GAMMA": at_least(0),
    "MODEL.*.IOUS": IOU_THRESHOLDS,
    "MODEL.*.IOU_THRESHOLDS": IOU_THRESHOLDS,
    "MODEL.*.NMS_THRESH*": FRACTION,
    "MODEL.*.NUM_CLASSES": at_least(1),
    "MODEL.*.NUM_CONV": at_least(0),
    "MODEL.*.NUM_CONVS": at_least(1),
    "MODEL.*.NUM_FC": at_least(0),
    "MODEL.*.POOLER_RESOLUTION": at_least(1),
    "MODEL.*.POOLER_SAMPLING_RATIO": at_least(0),
    "MODEL.*.POSITIVE_FRACTION": FRACTION,
    "MODEL.*.PRIOR_PROB": INSIDE_0_1,
    "MODEL.*.TOPK_CANDIDATES_TEST": at_least(1),
    "MODEL.*OUT_CHANNELS": at_least(1),
    "MODEL.*SMOOTH_L1*BETA": at_least(0),
    "MODEL.*_DIM": at_least(1),
    "MODEL.*_WEIGHT": at_least(0),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _ANCHORS,
    "MODEL.ANCHOR_GENERATOR.SIZES": _ANCHORS,
    "MODEL.PIXEL_MEAN": list_of(FINITE),
    "MODEL.PIXEL_STD": list_of(POSITIVE),
    "MODEL.PROPOSAL_GENERATOR.NAME": Rule(
        lambda x: x != "PrecomputedProposals", "a network such as RPN: no proposals are read"
    ),
    "MODEL.RESNETS.NUM_GROUPS": at_least(1),
    "MODEL.RESNETS.RES4_DILATION": Rule(lambda x: x in (1, 2), "1 or 2"),
    "MODEL.RESNETS.RES5_DILATION": Rule(lambda x: x in (1, 2, 4), "1, 2 or 4"),
    "MODEL.RESNETS.RES5_MULTI_GRID": _THREE_COUNTS,
    "MODEL.RESNETS.WIDTH_PER_GROUP": at_least(1),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": BOX_WEIGHTS,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": Rule(
        lambda x: all(map(BOX_WEIGHTS.allows, x)), "a list of 4 numbers above 0 for each stage"
    ),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": BOX_WEIGHTS,
    "MODEL.RPN.*_NMS_TOPK_*": at_least(1),
    "MODEL.RPN.BBOX_REG_WEIGHTS": BOX_WEIGHTS,
    "MODEL.RPN.CONV_DIMS": list_of(Rule(lambda x: x == -1 or x >= 1, "-1 or at least 1")),
    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": at_least(1),
    "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS": _THREE_COUNTS,
    "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT": BELOW_1,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": at_least(1),
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE": one_of("cross_entropy", "hard_pixel_mining"),
    "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS": COUNTS,
    "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES": TEXTS,
    "OUTPUT_DIR": Rule(is_writable, "a folder that can be written to"),
    "SEED": Rule(lambda x: x < 2**31, "below 2^31"),
    "SOLVER.*_FACTOR": at_least(0),
    "SOLVER.*_ITERS": at_least(0),
    "SOLVER.BASE_LR*": at_least(0),
    "SOLVER.CHECKPOINT_PERIOD": at_least(1),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": POSITIVE,
    "SOLVER.GAMMA": at_least(0),
    "SOLVER.IMS_PER_BATCH": at_least(1),
    "SOLVER.MAX_ITER": at_least(1),
    "SOLVER.MOMENTUM": FRACTION,
    "SOLVER.NUM_DECAYS": at_least(1),
    "SOLVER.POLY_LR_CONSTANT_ENDING": FRACTION,
    "SOLVER.POLY_LR_POWER": at_least(0),
    "SOLVER.REFERENCE_WORLD_SIZE": at_least(0),
    "SOLVER.STEPS": _STEPS,
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "SOLVER.WEIGHT_DECAY_BIAS": Rule(
        lambda x: x is None or (is_number(x) and x >= 0), "None or at least 0"
    ),
    "SOLVER.WEIGHT_DECAY_NORM": at_least(0),
    "TEST.AUG.MAX_SIZE": at_least(1),
    "TEST.AUG.MIN_SIZES": COUNTS,
    "TEST.EVAL_PERIOD": at_least(0),
    "TEST.EXPECTED_RESULTS": Rule(
        lambda x: all(TEXTS.holds(k[:2]) and list_of(FINITE, 2, 2).holds(k[2:]) for k in x),
        "a list of [task, metric, value, tolerance]",
    ),
    "TEST.KEYPOINT_OKS_SIGMAS": list_of(POSITIVE, 0),
    "TEST.PRECISE_BN.NUM_ITER": at_least(1),
    "VIS_PERIOD": at_least(0),
}
# Keys that nothing in this trainer reads: the reason, and what to use instead.
_PROPOSALS = "detectron2 reads proposals from pickles, which can run any code; use an RPN"
UNREAD: dict[str, str] = {
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": _PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TEST": _PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TRAIN": _PROPOSALS,
    "MODEL.LOAD_PROPOSALS": _PROPOSALS,
    "VERSION": "old names of keys are not upgraded; use detectron2.config.upgrade_config",
}
_SUMS = ("YOLOv3", "YOLOv4", "YOLOv5", "YOLOv7")  # detectors with YOLOv5's loss
_INFINITE_TOO = ("SOLVER.CLIP_GRADIENTS.NORM_TYPE",)  # the infinity norm is the largest entry
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
        lambda c: not c.SOLVER.REFERENCE_WORLD_SIZE or student_architecture(c) not in _SUMS,
        "SOLVER.REFERENCE_WORLD_SIZE is {c.SOLVER.REFERENCE_WORLD_SIZE}, but YOLOv5's loss grows "
        "with the batch itself. Set it to 0, and SOLVER.ACCUMULATE to as many parts as memory "
        "needs.",
    ),
    (
        lambda c: not c.SOLVER.PATIENCE or (c.TEST.BEST_METRIC and c.TEST.EVAL_PERIOD),
        "SOLVER.PATIENCE is {c.SOLVER.PATIENCE}, but TEST.BEST_METRIC is '{c.TEST.BEST_METRIC}' "
        "and TEST.EVAL_PERIOD {c.TEST.EVAL_PERIOD}; it needs both: set them, or PATIENCE to 0.",
    ),
    (
        lambda c: not (c.CUDNN_BENCHMARK and c.DETERMINISTIC),
        "CUDNN_BENCHMARK is True, which DETERMINISTIC True switches off; set one of them to False.",
    ),
    (
        lambda c: not (c.TEST.PRECISE_BN.ENABLED and c.SOLVER.EMA.DECAY),
        "TEST.PRECISE_BN.ENABLED is True, which corrects the trained weights' statistics, but "
        "SOLVER.EMA.DECAY is {c.SOLVER.EMA.DECAY} and their average is evaluated; switch one off.",
    ),
    (
        lambda c: not (c.TEST.PRECISE_BN.ENABLED and c.SOLVER.QAT.ENABLED),
        "TEST.PRECISE_BN.ENABLED is True, which measures statistics that SOLVER.QAT.ENABLED True "
        "keeps; set one of them to False.",
    ),
    (
        lambda c: not c.SOLVER.QAT.ENABLED or c.SOLVER.QAT.CALIBRATION_ITERS < c.SOLVER.MAX_ITER,
        "SOLVER.QAT.CALIBRATION_ITERS is {c.SOLVER.QAT.CALIBRATION_ITERS}, so nothing would be "
        "quantized; it must be below SOLVER.MAX_ITER {c.SOLVER.MAX_ITER}.",
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
        lambda c: (
            c.SOLVER.LR_SCHEDULER_NAME == "WarmupFlatCosineLR"
            or c.SOLVER.WARMUP_METHOD != "quadratic"
        ),
        "SOLVER.WARMUP_METHOD is quadratic, which SOLVER.LR_SCHEDULER_NAME "
        "{c.SOLVER.LR_SCHEDULER_NAME} does not have; set that to WarmupFlatCosineLR, whose "
        "SOLVER.FLAT_FRACTION may be 0.",
    ),
    (
        lambda c: c.SOLVER.FLAT_FRACTION + c.SOLVER.TAIL_FRACTION < 1,
        "SOLVER.FLAT_FRACTION is {c.SOLVER.FLAT_FRACTION} and SOLVER.TAIL_FRACTION "
        "{c.SOLVER.TAIL_FRACTION}; they leave no iteration to the cosine: lower one of them.",
    ),
    (
        lambda c: c.SOLVER.WARMUP_MOMENTUM < 0 or c.SOLVER.OPTIMIZER == "SGD",
        "SOLVER.WARMUP_MOMENTUM is {c.SOLVER.WARMUP_MOMENTUM}, but SOLVER.OPTIMIZER "
        "{c.SOLVER.OPTIMIZER} has no momentum; set it to -1.",
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
        lambda c: bool(c.INPUT.AUGMENT.LAST_STEPS) == (c.INPUT.AUGMENT.SWITCH_ITER > 0),
        "INPUT.AUGMENT.LAST_STEPS is {c.INPUT.AUGMENT.LAST_STEPS} and SWITCH_ITER "
        "{c.INPUT.AUGMENT.SWITCH_ITER}; set both, or leave both at their defaults.",
    ),
    (
        lambda c: (
            c.INPUT.AUGMENT.STEPS or not (c.INPUT.AUGMENT.LAST_STEPS or c.INPUT.MULTI_SCALE.PERIOD)
        ),
        "INPUT.AUGMENT.STEPS is empty, but LAST_STEPS is {c.INPUT.AUGMENT.LAST_STEPS} and "
        "INPUT.MULTI_SCALE.PERIOD {c.INPUT.MULTI_SCALE.PERIOD}, which need it; set STEPS.",
    ),
    (
        lambda c: not (c.INPUT.AUGMENT.STEPS and c.INPUT.CROP.ENABLED),
        "INPUT.CROP.ENABLED is True, but INPUT.AUGMENT.STEPS {c.INPUT.AUGMENT.STEPS} takes the "
        "place of detectron2's augmentations; set it to False, or empty STEPS.",
    ),
    (
        lambda c: not c.INPUT.AUGMENT.STEPS or c.INPUT.FORMAT in ("BGR", "RGB"),
        "INPUT.FORMAT is {c.INPUT.FORMAT}; INPUT.AUGMENT.STEPS {c.INPUT.AUGMENT.STEPS} needs BGR "
        "or RGB.",
    ),
    (
        lambda c: c.INPUT.HSV.MODE == "add" or max(c.INPUT.HSV.GAINS) <= 1,
        "INPUT.HSV.GAINS is {c.INPUT.HSV.GAINS}; with INPUT.HSV.MODE scale they must be in [0, 1].",
    ),
    (
        lambda c: _fits_square_pad(c),
        "INPUT.AUGMENT.SIZE is {c.INPUT.AUGMENT.SIZE} and INPUT.MULTI_SCALE.RANGE "
        "{c.INPUT.MULTI_SCALE.RANGE} (times 32), which is larger than the square that images are "
        "padded to; set MODEL.CSPNEXT.SQUARE_PAD and MODEL.CSPDARKNET.SQUARE_PAD to 0.",
    ),
    (
        lambda c: len(c.MODEL.PIXEL_MEAN) == len(c.MODEL.PIXEL_STD) == channels(c.INPUT.FORMAT),
        "MODEL.PIXEL_MEAN is {c.MODEL.PIXEL_MEAN} and MODEL.PIXEL_STD {c.MODEL.PIXEL_STD}; they "
        "must have one number per channel of INPUT.FORMAT {c.INPUT.FORMAT}.",
    ),
    (
        lambda c: (
            student_architecture(c) != "PanopticFPN"
            or c.MODEL.MASK_ON
            or not c.MODEL.PANOPTIC_FPN.COMBINE.ENABLED
        ),
        "MODEL.MASK_ON is False, but PanopticFPN combines masks; set it to "
        "True, or MODEL.PANOPTIC_FPN.COMBINE.ENABLED to False.",
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
    (
        lambda c: c.MODEL.DEVICE != "cpu" or not any(c.MODEL.RESNETS.DEFORM_ON_PER_STAGE),
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE is {c.MODEL.RESNETS.DEFORM_ON_PER_STAGE}; "
        "detectron2's deformable convolution needs a GPU, but MODEL.DEVICE is cpu.",
    ),
)


def _has_output_stride(cfg: CfgNode) -> bool:
    """Return whether logits get the labels' size; always True without a DeepLabV3Head."""
    head, resnet = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.RESNETS
    if head.NAME != "DeepLabV3Head" or "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return True
    stride = 8 * (3 - resnet.RES4_DILATION) * (1 + (resnet.RES5_DILATION == 1))
    return list(head.IN_FEATURES) != ["res5"] or stride == head.COMMON_STRIDE


def _fits_square_pad(cfg: CfgNode) -> bool:
    """Return whether augmented images are at most as large as the square they are padded to."""
    pads = cfg.MODEL.CSPNEXT.SQUARE_PAD, cfg.MODEL.CSPDARKNET.SQUARE_PAD
    size, scales = cfg.INPUT.AUGMENT.SIZE, cfg.INPUT.MULTI_SCALE
    height = 32 * scales.RANGE[1] if scales.PERIOD else size[0]
    largest = max(height, height * size[1] / size[0])
    return not cfg.INPUT.AUGMENT.STEPS or all(pad == 0 or largest <= pad for pad in pads)


def _is_crop(kind: str, first: float, second: float) -> bool:
    if kind.startswith("relative"):
        return max(first, second) <= 1
    whole = first >= 1 and first == int(first) and second == int(second)
    return whole and (kind == "absolute" or first <= second)


def check_rules(key: str, value: Any) -> None:
    """Raise ConfigError, which names the key and the valid values, if a value is not valid."""
    for rule in _rules(key):
        rule.check(key, value)


@cache
def _rules(key: str) -> tuple[Rule, ...]:
    found = [rule for pattern, rule in _RULES.items() if fnmatchcase(key, pattern)]
    return tuple(found if key in _INFINITE_TOO else [FINITE, *found])


def check_together(cfg: CfgNode) -> None:
    """Raise ConfigError if values of several keys do not fit together."""
    for fit, sentence in _TOGETHER:
        if not fit(cfg):
            raise ConfigError(sentence.format(c=cfg))


def check_read(cfg: CfgNode) -> None:
    """Raise ConfigError if a key that nothing reads does not have its default."""
    defaults = dict(leaves(get_cfg()))
    for key, value in leaves(cfg):
        if key in UNREAD and value != defaults[key]:
            raise ConfigError(
                f"{key} is {value!r:.200}, but it is not read: {UNREAD[key]}, and leave this key "
                f"at {defaults[key]!r}."
            )


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a config and their values."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
