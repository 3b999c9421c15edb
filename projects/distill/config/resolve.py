"""The student's and the teacher's configs, which follow from the user's."""

from detectron2.config import CfgNode, get_cfg

from ..heads import DISTILL_HEAD_REGISTRY
from ..nets import add_config_read_by
from .architecture import student_architecture
from .load import permissions
from .teachers import read_teacher


def balance_mode(cfg: CfgNode) -> str:
    """Return ``MODEL.DISTILL.BALANCE.MODE``, none or gradient, with what auto stands for."""
    heads = [DISTILL_HEAD_REGISTRY.get(name) for name in cfg.MODEL.DISTILL.HEADS]
    mode: str = cfg.MODEL.DISTILL.BALANCE.MODE
    if not heads:
        return "none"
    if mode == "auto":
        key = "WEIGHT"
        unset = [head.config_node(cfg)[key] == head.section[key].initial for head in heads]
        return "gradient" if all(unset) else "none"
    return mode


def unlabeled_per_batch(cfg: CfgNode) -> int:
    """Return the number of unlabelled images in a batch of all processes.

    ``SOLVER.IMS_PER_BATCH`` may be scaled to the number of processes, and this number follows.
    """
    node = cfg.DATASETS
    return round(node.UNLABELED_RATIO * cfg.SOLVER.IMS_PER_BATCH) if node.UNLABELED else 0


def student_config(cfg: CfgNode) -> CfgNode:
    """Return the student's plain detectron2 config, as ``student.yaml`` holds it.

    Stock detectron2 knows all of its keys, except those of :func:`distill.nets.add_nets_config`
    that the network reads. The weights of a timm backbone are in the checkpoint.
    """
    student = get_cfg()
    add_config_read_by(cfg, student)
    _copy_known(cfg, student)
    if "TIMM" in student.MODEL:
        student.MODEL.TIMM.PRETRAINED, student.MODEL.TIMM.WEIGHTS = False, ""
    if not {"LAZY", "MODULE"}.isdisjoint(student.MODEL):
        student.MODEL.ALLOW_CODE = cfg.MODEL.ALLOW_CODE
    student.MODEL.META_ARCHITECTURE = student_architecture(cfg)
    return student


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if isinstance(value, CfgNode) and key in source:
            _copy_known(source[key], value)
        elif key in source:
            target[key] = source[key]


def teacher_config(cfg: CfgNode, *, trained: bool = True) -> CfgNode:
    """Return the teacher's own config, frozen, which ``MODEL.DISTILL.TEACHER`` describes.

    Its files are read once: ``cfg`` and copies of it keep the result until they describe another
    teacher.

    Args:
        trained: ``MODEL.WEIGHTS`` of a model-zoo config are the zoo's trained weights; if False,
            the weights from which their training started.

    Raises:
        ConfigError: no config file is given, or it is neither a file nor in the model zoo; or it
            cannot be read.
    """
    node = cfg.MODEL.DISTILL.TEACHER
    # Among the marks of yacs, such as "frozen": they are copied with the node and never dumped.
    known: dict[str, CfgNode] = vars(node).setdefault("__teachers__", {})
    allowed = permissions(cfg)
    described = repr((node.CONFIG_FILE, list(node.OPTS), node.WEIGHTS, trained, allowed))
    if described not in known:
        known[described] = read_teacher(node, trained, allowed)
    return known[described]
