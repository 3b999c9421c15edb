"""COCO's evaluation by faster-coco-eval: the numbers of pycocotools, several times as fast."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from detectron2.evaluation import coco_evaluation
from faster_coco_eval import COCO
from faster_coco_eval import COCOeval_faster as COCOevalFaster
from pycocotools.cocoeval import COCOeval


class FastCOCOeval(COCOevalFaster):
    """pycocotools' ``COCOeval`` as far as detectron2's evaluator uses it.

    Args:
        truth, detections: pycocotools' ``COCO``.
        iou_type: "bbox", "segm" or "keypoints".
    """

    summarize: Callable[..., None] = COCOeval.summarize

    def __init__(self, truth: Any, detections: Any, iou_type: str):
        own = (COCO(x.dataset) for x in (truth, detections))
        super().__init__(*own, iouType=iou_type, print_function=_silent)
        self.params.catIds = sorted(truth.getCatIds())  # for keypoints it has those with objects


class FastCOCOevalMaxDets(FastCOCOeval):
    """detectron2's ``COCOevalMaxDets``, for another number of detections than 100."""

    summarize = coco_evaluation.COCOevalMaxDets.summarize


@contextlib.contextmanager
def fast_evaluation() -> Iterator[None]:
    """Let detectron2's evaluator use these classes; it offers no argument for that."""
    with patch.multiple(
        coco_evaluation,
        COCOeval=FastCOCOeval,
        COCOeval_opt=FastCOCOeval,
        COCOevalMaxDets=FastCOCOevalMaxDets,
    ):
        yield


def _silent(*args: Any) -> None:
    pass
