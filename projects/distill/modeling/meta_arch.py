"""The distilled student as a detectron2 meta-architecture."""

import logging
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..config import teacher_config
from ..data.datasets import class_names
from ..errors import ConfigError
from ..families import DenseFamily, Family, RCNNFamily, SemanticFamily, build_family
from ..heads import DistillHead, build_heads, teacher_needed
from ..structures import NetworkInfo
from .teacher import Teacher, build_teacher

logger = logging.getLogger(__name__)


class DistillModel(nn.Module):
    """A stock detectron2 student, a frozen teacher, and heads that compare them.

    In training the student runs its own ``forward`` under taps; the teacher is asked only for
    what the heads that are active at this iteration need. In evaluation it is the student alone.

    Args:
        student: a plain detectron2 meta-architecture.
        teacher: None if no head needs one.
        heads: :class:`DistillHead` modules by name.
    """

    family_type: ClassVar[type[Family]] = Family

    @configurable
    def __init__(self, *, student: nn.Module, teacher: Teacher | None, heads: nn.ModuleDict):
        super().__init__()
        self.student = student
        self.family = build_family(student)
        self.check_student(type(student))
        self.heads = heads
        self.teacher = teacher  # no nn.Module: stays outside parameters() and state_dict()

    @classmethod
    def check_student(cls, architecture: type[nn.Module]) -> None:
        """Raises ConfigError if this class distils no students of such an architecture."""
        base = cls.family_type.architecture
        if not issubclass(architecture, base):
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE {cls.__name__} distils {base.__name__} students, not "
                f"{architecture.__name__}; change it or MODEL.DISTILL.STUDENT_ARCHITECTURE."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        student = META_ARCH_REGISTRY.get(cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE)(cfg)
        teacher, heads = None, nn.ModuleDict()
        if cfg.MODEL.DISTILL.HEADS:
            # More modules would shift torch's global random state and so the student's training.
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(max(cfg.SEED, 0))
                teacher = build_teacher(cfg) if teacher_needed(cfg) else None
                specs = network_infos(
                    cfg, build_family(student), teacher.family if teacher else None
                )
                heads = build_heads(cfg, *specs)
        return {"student": student, "teacher": teacher, "heads": heads}

    @property
    def device(self) -> torch.device:
        return self.student.device  # type: ignore[return-value]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """detectron2's contract: losses in training, predictions in evaluation."""
        if not self.training or not self.heads:
            return self.student(batched_inputs)
        needs = self.active_needs()
        asked = self.active_needs(of_teacher=True)
        with self.family.record(needs) as recorder:
            losses: dict[str, Tensor] = self.student(batched_inputs)
        batch = self.family.batch(recorder, batched_inputs)
        student = self.family.read(recorder, batch, needs)
        teacher = self.teacher.ask(student, asked) if self.teacher and asked else None
        for head in self.heads.values():
            losses.update(head(student, teacher))
        return losses

    def active_needs(self, of_teacher: bool = False) -> frozenset[str]:
        """Signals of the student that the heads with a weight at this iteration read.

        Args:
            of_teacher: the teacher's instead.
        """
        heads: list[DistillHead] = list(self.heads.values())  # type: ignore[arg-type]
        active = [h for h in heads if h.factor() != 0 and (h.needs_teacher or not of_teacher)]
        return frozenset().union(*(head.needs for head in active))


@META_ARCH_REGISTRY.register()
class DistillRCNN(DistillModel):
    """Students: GeneralizedRCNN (Faster, Mask, Cascade) and PanopticFPN."""

    family_type = RCNNFamily


@META_ARCH_REGISTRY.register()
class DistillRetinaNet(DistillModel):
    """Students: every ``DenseDetector`` (RetinaNet, FCOS, ATSS, GFL, RepPoints)."""

    family_type = DenseFamily


@META_ARCH_REGISTRY.register()
class DistillSemanticSegmentor(DistillModel):
    """Students: SemanticSegmentor."""

    family_type = SemanticFamily


def network_infos(
    cfg: CfgNode, student: Family, teacher: Family | None
) -> tuple[NetworkInfo, NetworkInfo | None]:
    """What heads may know of the two networks, class names included."""
    names = class_names(cfg, _semantic(student))
    if names is None or len(names) != student.num_classes:
        names = tuple(f"class {i}" for i in range(student.num_classes))
    own = student.info("student", names, _semantic_classes(cfg, student, names))
    if teacher is None:
        return own, None
    taught = _teacher_classes(cfg, names, teacher)
    semantic = _semantic_classes(teacher_config(cfg), teacher, taught, own.sem_seg_classes)
    return own, teacher.info("teacher", taught, semantic)


def _semantic_classes(
    cfg: CfgNode, family: Family, classes: tuple[str, ...], student: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Names of the classes of a semantic head, which is one of two heads in a Panoptic FPN.

    Args:
        cfg: of the network.
        classes: its own, those of the semantic head if it has no other.
        student: the names if the network is a teacher whose own are unknown.
    """
    if family.sem_seg_shape is None or _semantic(family):
        return classes if _semantic(family) else ()
    number = family.model.sem_seg_head.predictor.out_channels
    named = class_names(cfg, semantic=True), student
    unknown = "unknown teacher class" if student else "class"
    return next(
        (x for x in named if x and len(x) == number),
        tuple(f"{unknown} {i}" for i in range(number)),
    )


def _semantic(family: Family) -> bool:
    """Whether the network's classes are semantic ones, without instances."""
    return "rois" not in family.outputs and "sem_seg" in family.outputs


def _teacher_classes(cfg: CfgNode, student: tuple[str, ...], teacher: Family) -> tuple[str, ...]:
    """The teacher's class names: given, or those of its training set, or the student's."""
    number = teacher.num_classes
    given = tuple(cfg.MODEL.DISTILL.TEACHER.CLASSES)
    if given and len(given) != number:
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.CLASSES lists {len(given)} names, but the teacher predicts "
            f"{number} classes."
        )
    own = given or class_names(teacher_config(cfg), _semantic(teacher))
    if own and len(own) == number:
        return own
    if number == len(student):
        logger.warning("The teacher's class names are unknown; assuming those of the student.")
        return student
    # Only heads that compare predictions need names; they refuse these.
    return tuple(f"unknown teacher class {i}" for i in range(number))
