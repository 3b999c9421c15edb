"""COCO's evaluation with average recall among its results."""

from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator

from .fast_coco import fast_evaluation

RECALLS = ("AR", "AR50", "AR75", "ARs", "ARm", "ARl")
_SIZES = {"ARs": "small", "ARm": "medium", "ARl": "large"}


class COCORecallEvaluator(COCOEvaluator):
    """detectron2's evaluator on faster-coco-eval, whose results also have the average recall.

    AR is the mean over classes and IoU 0.5, 0.55, ..., 0.95 of the recall with as many detections
    per image as AP has. AR50 and AR75 are at one IoU; ARs, ARm and ARl are of small, medium and
    large objects. detectron2 prints some of them, but does not return them.
    """

    def _eval_predictions(self, predictions: Any, img_ids: Any = None) -> None:
        with fast_evaluation():
            super()._eval_predictions(predictions, img_ids)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Any = None
    ) -> dict[str, float]:
        results: dict[str, float] = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if coco_eval is None:
            recalls = dict.fromkeys(RECALLS, float("nan"))
        else:
            recalls = average_recalls(coco_eval)
        if iou_type == "keypoints":
            recalls.pop("ARs", None)  # as detectron2's APs: small objects have no keypoints
        return {**results, **recalls}


def average_recalls(coco_eval: Any) -> dict[str, float]:
    """Return the recalls of an accumulated ``COCOeval`` in percent; NaN without objects."""
    params, recall = coco_eval.params, coco_eval.eval["recall"]  # (T, K, A, M)
    areas = {name: params.areaRngLbl.index(name) for name in params.areaRngLbl}
    whole = recall[:, :, areas["all"], -1]
    parts = {
        "AR": whole,
        "AR50": whole[np.isclose(params.iouThrs, 0.5)],
        "AR75": whole[np.isclose(params.iouThrs, 0.75)],
        **{key: recall[:, :, areas[size], -1] for key, size in _SIZES.items() if size in areas},
    }
    found = {key: x[x > -1] for key, x in parts.items()}
    return {key: float(100 * x.mean()) if x.size else float("nan") for key, x in found.items()}
