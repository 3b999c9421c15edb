"""Evaluators of a data set, chosen by its ``evaluator_type``, and the metrics that they return."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOPanopticEvaluator,
    DatasetEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.registry import Registry

from ..config import student_class
from ..data.checks.coco_file import CocoFile
from ..data.checks.voc_folder import VOCFolder
from ..data.datasets import check_test_set, class_indices, predicted_classes
from ..data.registration import is_own_set, own_files
from ..errors import ConfigError, ResultsError
from ..evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from ..evaluation.coco_recall import COCORecallEvaluator
from ..evaluation.kitti import KITTIEvaluator, coco_evaluator
from ..evaluation.lvis import LVISEvaluator
from ..evaluation.own_coco import OwnCOCOEvaluator
from ..evaluation.own_voc import OwnVOCEvaluator
from ..families import FAMILIES
from ..section import check_choice
from ..utils.text import nearest
from .metrics import (
    cityscapes_metrics,
    cityscapes_semantic_metrics,
    coco_metrics,
    kitti_metrics,
    lvis_metrics,
    panoptic_metrics,
    semantic_metrics,
    voc_metrics,
)

logger = logging.getLogger(__name__)

EVALUATOR_REGISTRY = Registry("EVALUATOR")
EVALUATOR_REGISTRY.__doc__ = """
Registry of evaluators, by the ``evaluator_type`` of a data set's metadata.

A registered function is called as ``function(cfg, dataset_name, folder)`` and returns a list of
detectron2's evaluators, which may write files to the folder. :func:`returning` declares their
metrics.
"""
COCO_KEYPOINTS = 17  # the number of COCO's own sigmas
Evaluators = list[DatasetEvaluator]
Build = TypeVar("Build", bound=Callable[[CfgNode, str, str], Evaluators])
Metrics = Callable[[CfgNode, str], list[str]]


def returning(metrics: Metrics) -> Callable[[Build], Build]:
    """Declare the metrics of the evaluators that a registered function builds.

    Metrics that are not declared are unknown, so the config may name any.

    Args:
        metrics: called as ``metrics(cfg, dataset_name)``, it returns names such as "bbox/AP".
    """

    def declare(build: Build) -> Build:
        build.metrics = metrics  # type: ignore[attr-defined]
        return build

    return declare


def build_evaluators(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    """Build the evaluators of a data set, which read its annotations.

    Args:
        cfg: the whole config.
        dataset_name: name of a registered data set.
        folder: folder for the files that evaluators write.
    """
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    evaluators: Evaluators = EVALUATOR_REGISTRY.get(kind)(cfg, dataset_name, folder)
    return evaluators


# ---- Checks before and after an evaluation.


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
        if cfg.MODEL.KEYPOINT_ON and kind in ("coco", "coco_panoptic_seg"):
            _check_sigmas(cfg)


def _check_sigmas(cfg: CfgNode) -> None:
    given, expected = len(cfg.TEST.KEYPOINT_OKS_SIGMAS), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if (given or COCO_KEYPOINTS) != expected:
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {given or f'no sigma, so COCO uses {COCO_KEYPOINTS}'}; "
            f"give one for each of the {expected} of MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS,"
            f" such as {[0.05] * expected}; COCO's are 0.025 to 0.107."
        )


def check_metric_names(cfg: CfgNode, *, training: bool = True) -> None:
    """Check the metrics that a config names, after :func:`check_test_sets` has read the test sets.

    Args:
        cfg: the whole config.
        training: also check ``TEST.BEST_METRIC``, which an evaluation does not need.

    Raises:
        ConfigError: no evaluation of the test sets will return a metric of this name.
    """
    best = cfg.TEST.BEST_METRIC if training else ""
    names = metric_names(cfg) if best or cfg.TEST.EXPECTED_RESULTS else None
    if names is None:
        return
    if best:
        _check_metric("TEST.BEST_METRIC", best, names)
    if cfg.TEST.AUG.ENABLED:  # the suffix is that of Trainer.test_with_TTA
        names = [*names, *(x.replace("/", "_TTA/", 1) for x in names)]
    for task, metric, *_ in cfg.TEST.EXPECTED_RESULTS:
        _check_metric("TEST.EXPECTED_RESULTS", f"{task}/{metric}", names)


def metric_names(cfg: CfgNode) -> list[str] | None:
    """Return the names of the metrics in the log of an evaluation, or None if they are unknown.

    With several test sets, each name begins with that of the set. The outputs of a network of an
    unknown family are unknown, and so are its metrics.
    """
    if not issubclass(student_class(cfg), tuple(family.architecture for family in FAMILIES)):
        return None
    found: list[str] = []
    for name in cfg.DATASETS.TEST:
        build = EVALUATOR_REGISTRY.get(MetadataCatalog.get(name).evaluator_type)
        metrics: Metrics | None = getattr(build, "metrics", None)
        if metrics is None:
            return None
        prefix = f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
        found += [f"{prefix}{metric}" for metric in metrics(cfg, name)]
    return found


def _check_metric(key: str, name: str, valid: Sequence[str]) -> None:
    if not valid:
        raise ConfigError(
            f"{key} has {name}, but DATASETS.TEST is empty; name a test set, or empty this key."
        )
    if name not in valid:  # the message has the metrics of single classes only if it may help
        check_choice(key, name, [x for x in valid if "-" in name or "-" not in x.split("/")[-1]])


def check_results(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Compare the results of an evaluation with ``TEST.EXPECTED_RESULTS``, in all processes.

    Args:
        cfg: the whole config.
        results: metrics by task, or by data set and task. Only those of the first process count.

    Raises:
        ResultsError: a result is not within its tolerance.
    """
    if not cfg.TEST.EXPECTED_RESULTS:
        return
    found = flatten_results_dict(results)
    misses = []
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        value = found.get(f"{task}/{metric}", math.nan)
        if not abs(value - expected) <= tolerance:  # also true for NaN
            misses.append(f"{task}/{metric} is {value:.4f} instead of {expected} ± {tolerance}")
    misses = comm.all_gather(misses)[0]
    if misses:
        raise ResultsError(
            f"TEST.EXPECTED_RESULTS: {', '.join(misses)}; the checkpoints are complete: find the "
            "cause, or correct the expected results."
        )
    logger.info("The results are those of TEST.EXPECTED_RESULTS")


# ---- Evaluators.


@EVALUATOR_REGISTRY.register()
@returning(coco_metrics)
def coco(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    file = own_files(dataset_name) if is_own_set(cfg, dataset_name) else None
    if not isinstance(file, CocoFile):
        return [COCORecallEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas)]
    return [
        OwnCOCOEvaluator(
            dataset_name,
            file,
            class_indices(cfg, dataset_name),
            output_dir=folder,
            # An image of a user's own data set may have more objects than COCO's 100.
            max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
            kpt_oks_sigmas=sigmas,
        )
    ]


@EVALUATOR_REGISTRY.register()
@returning(panoptic_metrics)
def coco_panoptic_seg(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    return [
        SemSegEvaluator(dataset_name, output_dir=folder),
        COCORecallEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas),
        COCOPanopticEvaluator(dataset_name, folder),
    ]


@EVALUATOR_REGISTRY.register()
@returning(cityscapes_metrics)
def cityscapes_instance(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [CityscapesInstanceEvaluator(dataset_name, folder)]


@EVALUATOR_REGISTRY.register()
@returning(cityscapes_semantic_metrics)
def cityscapes_sem_seg(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [CityscapesSemanticEvaluator(dataset_name, folder)]


@EVALUATOR_REGISTRY.register()
@returning(kitti_metrics)
def kitti(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [coco_evaluator(dataset_name, folder), KITTIEvaluator(dataset_name)]


@EVALUATOR_REGISTRY.register()
@returning(lvis_metrics)
def lvis(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [LVISEvaluator(dataset_name, output_dir=folder)]


@EVALUATOR_REGISTRY.register()
@returning(voc_metrics)
def pascal_voc(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    files = own_files(dataset_name) if is_own_set(cfg, dataset_name) else None
    if not isinstance(files, VOCFolder):
        return [PascalVOCDetectionEvaluator(dataset_name)]
    return [OwnVOCEvaluator(dataset_name, files, predicted_classes(cfg, dataset_name))]


@EVALUATOR_REGISTRY.register()
@returning(semantic_metrics)
def sem_seg(cfg: CfgNode, dataset_name: str, folder: str) -> Evaluators:
    return [SemSegEvaluator(dataset_name, output_dir=folder)]
