"""Which heads distil which teacher into which student.

Every pair is built, with the losses and gradients of a step. Networks are those of the shapes
configs, at a few channels, with random weights. The documentation has a page of the result.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..config import load_config
from ..errors import ConfigError
from ..families import build_family
from ..heads import DISTILL_HEAD_REGISTRY
from ..modeling.meta_arch import DistillModel
from ..modeling.teacher import Teacher
from ..structures import NetworkInfo
from ..utils.progress import Progress
from .benchmark.networks import synthetic_batch

PANOPTIC: list[Any] = [
    *("MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
]
R_CNN, DENSE = "build_shallow_resnet_{}_backbone", "build_retinanet_shallow_resnet_{}_backbone"
P3_TO_P7: list[Any] = [
    *("MODEL.REPPOINTS.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"], "MODEL.REPPOINTS.NORM", "")
]
# Name of a config, overrides, and the backbone for any neck; "": the config names the backbone.
NETWORKS: dict[str, tuple[str, Sequence[Any], str]] = {
    "Faster R-CNN": ("Shapes-Detection/faster_rcnn_R_10_FPN_32", (), R_CNN),
    "Mask R-CNN": ("Shapes-InstanceSegmentation/mask_rcnn_R_10_FPN_32", (), R_CNN),
    "Cascade Mask R-CNN": ("Shapes-InstanceSegmentation/cascade_mask_rcnn_R_10_FPN_32", (), R_CNN),
    "Panoptic FPN": ("Shapes-InstanceSegmentation/mask_rcnn_R_10_FPN_32", PANOPTIC, R_CNN),
    "RetinaNet": ("Shapes-Detection/retinanet_R_18_FPN_32", (), DENSE),
    "FCOS": ("Shapes-Detection/fcos_R_18_FPN_32", (), DENSE),
    "ATSS": ("Shapes-Detection/atss_R_18_FPN_32", (), DENSE),
    "GFL": ("Shapes-Detection/gfl_R_18_FPN_32", (), DENSE),
    "RepPoints": ("Shapes-Detection/reppoints_R_18_FPN_32", P3_TO_P7, DENSE),
    "RTMDet": ("Shapes-Detection/rtmdet_PAFPN_32", (), ""),
    "RTMDet-Ins": ("Shapes-InstanceSegmentation/rtmdet_ins_PAFPN_32", (), ""),
    "YOLOX": ("Shapes-Detection/yolox_PAFPN_32", (), ""),
    "YOLOv3": ("Shapes-Detection/yolov3_FPN_32", (), ""),
    "YOLOv4": ("Shapes-Detection/yolov4_PAFPN_32", (), ""),
    "YOLOv5": ("Shapes-Detection/yolov5_PAFPN_32", (), ""),
    "YOLOv7": ("Shapes-Detection/yolov7_PAFPN_32", (), ""),
    "Semantic FPN": ("Shapes-SemanticSegmentation/semantic_fpn_R_10_FPN_32", (), R_CNN),
    "PSPNet": ("Shapes-SemanticSegmentation/pspnet_R_10", (), ""),
    "DeepLabV3": ("Shapes-SemanticSegmentation/deeplabv3_R_18", (), ""),
}
NARROW: list[Any] = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.DISTILL.MASKDLOGITS.TOKEN_ITERS", 0),
    *("MODEL.DISTILL.MASKD.TOKEN_ITERS", 0, "MODEL.DISTILL.FRS.WARMUP_ITERS", 0),
]
# Predictors of boxes that have no size before a training.
EMPTY_AT_START = {"FCOS": ("bbox_pred",), "RepPoints": ("init_points",)}
SIZE = 64  # side of the images
FAILS = "FAILS"  # begins the reason of a head that has taken a step in vain


class SupportMatrix(NamedTuple):
    """Reasons why heads do not work; empty where a head has taken a step.

    Attributes:
        pairs: by student, teacher and head.
        without_teacher: by student with FPN+PAN, or YOLOv3's neck, and head.
    """

    pairs: dict[str, dict[str, dict[str, str]]]
    without_teacher: dict[str, dict[str, str]]

    @property
    def steps(self) -> dict[str, str]:
        """Reason why a step fails, "" if it does not, by its names; all that no head refuses."""
        rows = {
            f"{student} taught by {teacher}": row
            for student, teachers in self.pairs.items()
            for teacher, row in teachers.items()
        }
        return {
            f"{head}, {name}": reason
            for name, row in (rows | self.without_teacher).items()
            for head, reason in row.items()
            if not reason or reason.startswith(FAILS)
        }


def support_matrix(
    progress: Progress, teachers: Callable[[str], Iterable[str]] = lambda student: NETWORKS
) -> SupportMatrix:
    """Try every head on every student with each of its teachers, by default all networks."""
    heads = [name for name, cls in DISTILL_HEAD_REGISTRY if cls.needs_teacher]
    pairs = {}
    for student in progress.track(list(NETWORKS), description="students"):
        cfg, own = config(student), network(student, "student")
        pairs[student] = {
            teacher: try_heads(cfg, own, network(teacher, "teacher"), heads)
            for teacher in teachers(student)
        }
    heads = [name for name, cls in DISTILL_HEAD_REGISTRY if not cls.needs_teacher]
    without_teacher = {}
    for student in NETWORKS:
        cfg = config(student, "pafpn")
        if "fpn" in cfg.MODEL.BACKBONE.NAME:  # YOLOv3's neck has no bottom-up pathway
            without_teacher[student] = try_heads(cfg, build_model(cfg).train(), None, heads)
    return SupportMatrix(pairs, without_teacher)


def config(name: str, neck: str = "fpn") -> CfgNode:
    file, opts, backbone = NETWORKS[name]
    cfg = load_config(f"{file}.yaml", [*NARROW, *opts])
    if backbone:
        cfg.MODEL.BACKBONE.NAME = backbone.format(neck)
    return cfg


@cache
def network(name: str, role: str) -> Any:
    torch.manual_seed(len(role))  # the teacher's weights are other ones
    model: Any = build_model(config(name)).train(role == "student")
    for predictor in EMPTY_AT_START.get(name, ()):
        nn.init.normal_(model.head.get_submodule(predictor).bias, 1.0)
    return model


def spec(role: str, model: Any) -> NetworkInfo:
    family = build_family(model)
    names = tuple(f"class {i}" for i in range(family.num_classes))
    number = model.sem_seg_head.predictor.out_channels if family.sem_seg_shape else 0
    return family.info(role, names, tuple(f"class {i}" for i in range(number)))


def images(classes: int) -> list[dict[str, Any]]:
    return synthetic_batch(2, SIZE, SIZE, min(classes, 8), 3, seed=0)


def try_heads(
    cfg: CfgNode, student: Any, teacher: Any | None, heads: Sequence[str]
) -> dict[str, str]:
    """Return why each head fails for two networks; "" if it has taken a step."""
    specs = spec("student", student), spec("teacher", teacher) if teacher else None
    found, built = {}, nn.ModuleDict()
    for head in heads:
        cls = DISTILL_HEAD_REGISTRY.get(head)
        reason = cls.problem(*specs) or ""
        try:
            built.update({} if reason else {head: cls(cfg, *specs)})
        except ConfigError as e:
            reason = str(e).rstrip(".")
        found[head] = re.sub(r" \(\w+\)", "", reason)  # without the classes, which differ by row
    family = build_family(teacher) if teacher else None
    asked = Teacher(family, input_format="BGR", student_format="BGR") if family else None
    own = build_family(student)
    distill = next(x for x in DistillModel.__subclasses__() if isinstance(own, x.family_type))
    model = distill(student=student, teacher=asked, heads=built).train()
    maps: dict[str, Tensor] = {}  # the backbone's, on which all compared outputs depend
    hook = student.backbone.register_forward_hook(lambda *call: maps.update(call[-1]))
    with EventStorage():
        losses: dict[str, Tensor] = model(images(own.num_classes))
    hook.remove()
    for head in built:
        of_head = [x for k, x in losses.items() if k.split("/")[0] == f"loss_{head.lower()}"]
        gradients = torch.autograd.grad(
            of_head, list(maps.values()), retain_graph=True, allow_unused=True
        )
        norms = [x.norm() for x in gradients if x is not None]
        if not all(x.isfinite() for x in (*of_head, *norms)):
            found[head] = f"{FAILS}: a loss or gradient is not finite"
        elif not any(norms):
            found[head] = f"{FAILS}: no gradient reaches the student"
    student.zero_grad()
    sum(losses.values()).backward()  # type: ignore[union-attr]
    if not nn.utils.clip_grad_norm_(student.parameters(), math.inf).isfinite():
        found |= dict.fromkeys(built, f"{FAILS}: a gradient of the student is not finite")
    return found
