"""Evaluators of a data set, chosen by its ``evaluator_type``."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..data.datasets import check_test_set, is_own_set
from ..errors import ConfigError
from ..evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from ..evaluation.kitti import KITTIEvaluator, coco_evaluator


def evaluator_builders(cfg: CfgNode, dataset_name: str, folder: str) -> list[Callable[[], Any]]:
    """Return functions that build the evaluators of a data set and read its annotations.

    Args:
        cfg: config with ``DATASETS.COCO_FORMAT`` and ``TEST.DETECTIONS_PER_IMAGE``.
        dataset_name: name of a registered data set.
        folder: folder for the files that evaluators write.

    Raises:
        ConfigError: the data set has no or an unknown ``evaluator_type``.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    builders: dict[str, list[Callable[[], Any]]] = {
        "coco": [
            lambda: COCOEvaluator(
                dataset_name, output_dir=folder, max_dets_per_image=_max_dets(cfg, dataset_name)
            )
        ],
        "cityscapes_instance": [lambda: CityscapesInstanceEvaluator(dataset_name, folder)],
        "cityscapes_sem_seg": [lambda: CityscapesSemanticEvaluator(dataset_name, folder)],
        "kitti": [
            lambda: coco_evaluator(dataset_name, folder),
            lambda: KITTIEvaluator(dataset_name),
        ],
        "pascal_voc": [lambda: PascalVOCDetectionEvaluator(dataset_name)],
        "sem_seg": [lambda: SemSegEvaluator(dataset_name, output_dir=folder)],
        "coco_panoptic_seg": [
            lambda: SemSegEvaluator(dataset_name, output_dir=folder),
            lambda: COCOEvaluator(dataset_name, output_dir=folder),
            lambda: COCOPanopticEvaluator(dataset_name, folder),
        ],
    }
    if kind not in builders:
        raise ConfigError(
            f"DATASETS.TEST '{dataset_name}' has evaluator type '{kind}'; "
            f"it must be one of: {', '.join(builders)}."
        )
    return builders[kind]


def _max_dets(cfg: CfgNode, dataset_name: str) -> int | None:
    """Return the number of detections per image that COCO's metrics count; None: COCO's 100.

    An image of a user's own data set may have more objects.
    """
    own = is_own_set(cfg, dataset_name)
    return max(100, cfg.TEST.DETECTIONS_PER_IMAGE) if own else None


def check_test_sets(cfg: CfgNode) -> None:
    """Raise an error before the training if the evaluation after it would fail.

    Raises:
        ConfigError, DataError: a test set has no evaluator, no images or unreadable annotations.
    """
    for name in cfg.DATASETS.TEST:
        evaluator_builders(cfg, name, cfg.OUTPUT_DIR)
        check_test_set(cfg, name)
