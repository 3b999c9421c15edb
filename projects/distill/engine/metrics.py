"""Names of the metrics that each evaluator returns: "task/metric", for a config and a data set."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN

from ..config import student_class
from ..data.cityscapes import label_table
from ..data.kitti import KITTI_CLASSES
from ..evaluation.coco_recall import RECALLS
from ..evaluation.kitti import DIFFICULTIES

_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # APs, APm and APl by the size of the objects
_PQ = ("PQ", "SQ", "RQ")


def _tasks(cfg: CfgNode) -> list[str]:
    """Return the tasks of COCO's evaluation that the student's outputs have."""
    has_branches = issubclass(student_class(cfg), GeneralizedRCNN)
    branches = {"segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return ["bbox", *(task for task, on in branches.items() if on and has_branches)]


def _by_class(metric: str, dataset_name: str, kind: str = "thing") -> list[str]:
    names = MetadataCatalog.get(dataset_name).get(f"{kind}_classes") or ()
    return [f"{metric}-{name}" for name in names]


def _in_task(task: str, *metrics: str) -> list[str]:
    return [f"{task}/{metric}" for metric in metrics]


def coco_metrics(cfg: CfgNode, dataset_name: str) -> list[str]:
    by_class = _by_class("AP", dataset_name)
    metrics = [*_AP, *RECALLS, *(by_class if len(by_class) > 1 else ())]  # as detectron2
    names = [name for task in _tasks(cfg) for name in _in_task(task, *metrics)]
    small = ("keypoints/APs", "keypoints/ARs")  # small objects have no keypoints
    return [name for name in names if name not in small]


def semantic_metrics(cfg: CfgNode, dataset_name: str) -> list[str]:
    kinds = ("IoU", "BoundaryIoU", "min(IoU, B-Iou)", "ACC")
    by_class = [name for kind in kinds for name in _by_class(kind, dataset_name, "stuff")]
    return _in_task("sem_seg", "mIoU", "fwIoU", "mACC", "pACC", *by_class)


def panoptic_metrics(cfg: CfgNode, dataset_name: str) -> list[str]:
    panoptic = [f"{metric}{suffix}" for suffix in ("", "_th", "_st") for metric in _PQ]
    both = [*semantic_metrics(cfg, dataset_name), *coco_metrics(cfg, dataset_name)]
    return [*both, *_in_task("panoptic_seg", *panoptic)]


def cityscapes_metrics(cfg: CfgNode, dataset_name: str) -> list[str]:
    by_class = [f"AP-{label.name}" for label in _cityscapes_labels() if label.hasInstances]
    return _in_task("segm", "AP", "AP50", *by_class)


def cityscapes_semantic_metrics(cfg: CfgNode, dataset_name: str) -> list[str]:
    metrics = ("IoU", "iIoU", "IoU_sup", "iIoU_sup", "mIoU_present")
    by_class = [f"IoU-{label.name}" for label in _cityscapes_labels()]
    return _in_task("sem_seg", *metrics, *by_class)


def _cityscapes_labels() -> list[Any]:
    """Return the evaluated labels of Cityscapes' own table."""
    return [x for x in label_table().values() if x.id >= 0 and not x.ignoreInEval]


def kitti_metrics(cfg: CfgNode, dataset_name: str) -> list[str]:
    by_class = [f"AP-{name}" for name in KITTI_CLASSES]
    rows = [f"{name}/{level}" for name in (*KITTI_CLASSES, "mAP") for level in DIFFICULTIES]
    return [*_in_task("bbox", *_AP, *RECALLS, *by_class), *_in_task("kitti", *rows)]


def lvis_metrics(cfg: CfgNode, dataset_name: str) -> list[str]:
    tasks = [task for task in _tasks(cfg) if task != "keypoints"]
    return [name for task in tasks for name in _in_task(task, *_AP, "APr", "APc", "APf")]


def voc_metrics(cfg: CfgNode, dataset_name: str) -> list[str]:
    return _in_task("bbox", "AP", "AP50", "AP75")
