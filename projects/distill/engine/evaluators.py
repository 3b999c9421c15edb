"""Evaluators of a data set, chosen by its ``evaluator_type``."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils.registry import Registry

from ..data.datasets import check_test_set, class_indices, coco_file, is_own_set
from ..errors import ConfigError
from ..evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from ..evaluation.kitti import KITTIEvaluator, coco_evaluator
from ..evaluation.lvis import LVISEvaluator
from ..evaluation.own_coco import OwnCOCOEvaluator
from ..utils.text import nearest

EVALUATOR_REGISTRY = Registry("EVALUATOR")
EVALUATOR_REGISTRY.__doc__ = """
Registry of evaluators, by the ``evaluator_type`` of a data set's metadata.

A registered function is called as ``function(cfg, dataset_name, folder)`` and returns a list of
detectron2's evaluators, which may write files to the folder.
"""
Evaluators = list[DatasetEvaluator]


def build_evaluators(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    """Build the evaluators of a data set, which read its annotations.

    Args:
        cfg: config with ``DATASETS.COCO_FORMAT`` and ``TEST.DETECTIONS_PER_IMAGE``.
        dataset_name: name of a registered data set.
        folder: folder for the files that evaluators write.
    """
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    evaluators: Evaluators = EVALUATOR_REGISTRY.get(kind)(cfg, dataset_name, folder)
    return evaluators


def check_test_sets(cfg: CfgNode) -> None:
    """Raise an error before the training if the evaluation after it would fail.

    Raises:
        ConfigError, DataError: a test set has no evaluator, no images or unreadable annotations.
    """
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind not in EVALUATOR_REGISTRY:
            raise ConfigError(
                f"DATASETS.TEST '{name}' has evaluator type '{kind}'; evaluators exist for: "
                f"{nearest(kind, [kind for kind, _ in EVALUATOR_REGISTRY])}. Register your own in "
                "distill.engine.evaluators.EVALUATOR_REGISTRY."
            )
        check_test_set(cfg, name)


@EVALUATOR_REGISTRY.register()
def coco(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    file = coco_file(dataset_name) if is_own_set(cfg, dataset_name) else None
    if file is None:
        return [COCOEvaluator(dataset_name, output_dir=folder)]
    return [
        OwnCOCOEvaluator(
            dataset_name,
            file,
            class_indices(cfg, dataset_name),
            output_dir=folder,
            # An image of a user's own data set may have more objects than COCO's 100.
            max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
        )
    ]


@EVALUATOR_REGISTRY.register()
def coco_panoptic_seg(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [
        SemSegEvaluator(dataset_name, output_dir=folder),
        COCOEvaluator(dataset_name, output_dir=folder),
        COCOPanopticEvaluator(dataset_name, folder),
    ]


@EVALUATOR_REGISTRY.register()
def cityscapes_instance(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [CityscapesInstanceEvaluator(dataset_name, folder)]


@EVALUATOR_REGISTRY.register()
def cityscapes_sem_seg(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [CityscapesSemanticEvaluator(dataset_name, folder)]


@EVALUATOR_REGISTRY.register()
def kitti(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [coco_evaluator(dataset_name, folder), KITTIEvaluator(dataset_name)]


@EVALUATOR_REGISTRY.register()
def lvis(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [LVISEvaluator(dataset_name, output_dir=folder)]


@EVALUATOR_REGISTRY.register()
def pascal_voc(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [PascalVOCDetectionEvaluator(dataset_name)]


@EVALUATOR_REGISTRY.register()
def sem_seg(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [SemSegEvaluator(dataset_name, output_dir=folder)]
