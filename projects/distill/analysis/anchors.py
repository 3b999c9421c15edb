"""Find anchors of YOLOv3, YOLOv4, YOLOv5 or YOLOv7 for the boxes of a config's training sets.

    distill anchors --config-file F [--seed 0] [KEY VALUE ...]

The boxes have the size that the config gives to training images (INPUT.MIN_SIZE_TRAIN and
MAX_SIZE_TRAIN). Other augmentations are not counted. The command prints the best possible recall of
the config's anchors (MODEL.YOLOV5.ANCHORS) and of new anchors, and the yaml lines that set these.
The recall is the share of boxes that an anchor fits, by MODEL.YOLOV5.ANCHOR_RATIO. There are as
many new anchors and levels as the config has. YOLOv3, YOLOv4 and YOLOv7 have sections of their own.

The method is YOLOv5's: k-means, then random changes that are kept if the anchors fit better.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import reduce
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BoxMode
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans

from ..config import student_architecture
from ..data.datasets import load_training_set
from ..engine import setup_config
from ..errors import DataError
from ..utils.arguments import add_config_arguments, at_least
from ..utils.progress import Progress

ENOUGH = 0.98  # YOLOv5 keeps anchors of a higher recall
JITTER = 0.1  # boxes are larger or smaller by at most this share where a recall is measured
SMALLEST = 2.0  # pixels; boxes whose longer side is shorter make no anchors
STARTS = 30  # k-means from random boxes, of which the best is taken
ROUNDS = 1000  # random changes
CHANGED, SPREAD, LEAST, MOST = 0.9, 0.1, 0.3, 3.0  # share, σ and limits of factors of the sides

Sizes = NDArray[np.float64]
"""(N, 2) widths and heights in pixels."""


def box_sizes(cfg: CfgNode, dicts: Sequence[dict[str, Any]], rng: np.random.Generator) -> Sizes:
    """Return the sizes of all boxes with an area, in images that are resized as in the training.

    Args:
        cfg: config with the sizes of training images, of which each image draws one.
        dicts: dataset dicts.
        rng: generator of the draws.
    """
    found = [np.empty((0, 2))]
    for entry in dicts:
        boxes = [
            BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYWH_ABS)[2:]
            for x in entry.get("annotations", ())
            if not x.get("iscrowd")
        ]
        before = entry["height"], entry["width"]
        after = _resized(before, cfg.INPUT, rng)
        scale = [after[1] / before[1], after[0] / before[0]]
        found.append(np.array(boxes, float).reshape(-1, 2) * scale)
    sizes = np.concatenate(found)
    return sizes[sizes.min(1, initial=np.inf) > 0]


def _resized(size: tuple[int, int], node: CfgNode, rng: np.random.Generator) -> tuple[int, int]:
    """Return height and width of an image after the resize that detectron2 draws for it."""
    sides = node.MIN_SIZE_TRAIN
    if node.MIN_SIZE_TRAIN_SAMPLING == "range":
        side = int(rng.integers(min(sides), max(sides) + 1))
    else:
        side = int(rng.choice(sides))
    if side == 0:  # which means no resize
        return size
    return ResizeShortestEdge.get_output_shape(*size, side, node.MAX_SIZE_TRAIN)


def fits(sizes: Sizes, anchors: Sizes) -> NDArray[np.float64]:
    """Return (N,) how well the best of the anchors fits each box, in (0, 1].

    The fit of an anchor is the smallest ratio of its sides to those of the box, the smaller side
    over the larger. That is exp(−max(|log w − log a_w|, |log h − log a_h|)).
    """
    w, h = np.log(sizes).T.copy()
    differences = (np.maximum(abs(w - a_w), abs(h - a_h)) for a_w, a_h in np.log(anchors))
    return np.exp(-reduce(np.minimum, differences))  # less memory than (N, K) arrays


def recall(sizes: Sizes, anchors: Sizes, ratio: float) -> float:
    """Return the share of boxes that an anchor fits: no side differs by ``ratio`` or more."""
    return float((fits(sizes, anchors) > 1 / ratio).mean())


def fitness(sizes: Sizes, anchors: Sizes, ratio: float) -> float:
    """Return the mean fit of the boxes, in which one that no anchor fits counts 0."""
    found = fits(sizes, anchors)
    return float(np.where(found > 1 / ratio, found, 0).mean())


def clustered(sizes: Sizes, count: int, rng: np.random.Generator) -> Sizes:
    """Return ``count`` anchors by k-means of the sizes over their standard deviation.

    If there are fewer clusters, as of boxes with few sizes, the others are random boxes.
    """
    deviation = sizes.std(0)
    deviation[deviation == 0] = 1
    centres, _ = kmeans(sizes / deviation, min(count, len(sizes)), iter=STARTS, seed=rng)
    others = rng.choice(sizes, count - len(centres))
    return np.concatenate([centres * deviation, others])


def evolved(
    sizes: Sizes,
    anchors: Sizes,
    ratio: float,
    rng: np.random.Generator,
    advance: Callable[[], None] = lambda: None,
) -> Sizes:
    """Multiply sides of anchors by random factors, and keep what fits the boxes better.

    Args:
        sizes: sizes of the boxes.
        anchors: (K, 2) at the start.
        ratio: see :func:`recall`.
        rng: generator of the factors.
        advance: called after each of :data:`ROUNDS`.
    """
    best = fitness(sizes, anchors, ratio)
    for _ in range(ROUNDS):
        factors = rng.normal(1, SPREAD, anchors.shape).clip(LEAST, MOST)
        factors[rng.random(anchors.shape) > CHANGED] = 1
        found = fitness(sizes, anchors * factors, ratio)
        if found > best:
            anchors, best = anchors * factors, found
        advance()
    return anchors


def by_level(anchors: Sizes, levels: int) -> list[list[list[int]]]:
    """Return whole pixels, from small to large areas over the levels."""
    whole = anchors.round().clip(1).astype(int)
    whole = whole[np.argsort(whole.prod(1), kind="stable")]
    return whole.reshape(levels, -1, 2).tolist()


def judged(
    sizes: Sizes, anchors: Sequence[Sequence[Sequence[float]]], ratio: float
) -> tuple[float, float]:
    """Return :func:`recall` and :func:`fitness` of anchors per level."""
    flat = np.array(anchors, float).reshape(-1, 2)
    return recall(sizes, flat, ratio), fitness(sizes, flat, ratio)


def section_of(cfg: CfgNode) -> str:
    """Return the name of the student's section, or YOLOv5's if it has no anchors."""
    name = student_architecture(cfg).upper()
    return name if "ANCHORS" in cfg.MODEL.get(name, {}) else "YOLOV5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="seed of all draws; default: %(default)s"
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    cfg = setup_config(args.config_file, args.opts)
    section = section_of(cfg)
    node, rng = cfg.MODEL[section], np.random.default_rng(args.seed)
    with redirect_stdout(sys.stderr):  # detectron2 prints what it loads
        dicts = load_training_set(cfg)
    sizes = box_sizes(cfg, dicts, rng)
    large = sizes[sizes.max(1, initial=0) >= SMALLEST]
    if not len(large):
        raise DataError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no boxes of {SMALLEST:g} pixels; name "
            "a training set with objects, or raise INPUT.MIN_SIZE_TRAIN."
        )
    with Progress(transient=True) as progress:
        task = progress.add_task("fit anchors", total=ROUNDS)
        anchors = clustered(large, sum(map(len, node.ANCHORS)), rng)
        anchors = evolved(large, anchors, node.ANCHOR_RATIO, rng, lambda: progress.advance(task))
    jittered = sizes * rng.uniform(1 - JITTER, 1 + JITTER, (len(sizes), 1))
    new = by_level(anchors, len(node.ANCHORS))
    old, found = (judged(jittered, x, node.ANCHOR_RATIO) for x in (node.ANCHORS, new))
    print(f"{len(sizes)} boxes of {len(dicts)} images")
    print("anchors  best possible recall  mean fit")
    for name, (share, fit) in {"config": old, "new": found}.items():
        print(f"{name:7}  {share:20.2%}  {fit:8.3f}")
    if old[0] > ENOUGH or old[0] >= found[0]:
        print("The anchors of the config fit this data well enough. The new ones would be:")
    print(f"MODEL:\n  {section}:\n    ANCHORS:", *(f"    - {level}" for level in new), sep="\n")
    return 0
