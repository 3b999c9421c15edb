"""The distilled student as a detectron2 meta-architecture."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import Tensor, nn

from ..config import (
    balance_mode,
    distill_architectures,
    one_per_teacher,
    student_architecture,
    student_config,
)
from ..errors import ConfigError, building
from ..families import DenseFamily, Family, RCNNFamily, SemanticFamily, build_family
from ..heads import DistillHead, teacher_needed
from ..structures import Batch, NetworkOutputs
from .balance import GradientBalance
from .distillation import build_all_heads, build_balance, build_teachers, infos_by_teacher
from .teacher import Teacher
from .unlabeled import Unlabeled, build_unlabeled, is_unlabeled, unlogged

logger = logging.getLogger(__name__)


class DistillModel(nn.Module):
    """A stock detectron2 student, its frozen teachers, and heads that compare them.

    In training the student runs its own ``forward``, whose outputs are recorded. A teacher computes
    only the outputs that its heads active at this iteration need. In evaluation the model is the
    student.

    Args:
        student: a plain detectron2 meta-architecture.
        teacher: the teacher, or several by name; None if no head needs one.
        heads: :class:`DistillHead` modules by name.
        balance: sets the heads' weights; None: they are those of the config.
        unlabeled: labels of images without any; None: there are no such images.
    """

    family_type: ClassVar[type[Family]] = Family
    """Family of the students that this class accepts."""

    student_architecture: ClassVar[str] = ""
    """Student if ``MODEL.DISTILL.STUDENT_ARCHITECTURE`` is empty; "" if there is no default."""

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | Mapping[str, Teacher] | None,
        heads: nn.ModuleDict,
        balance: GradientBalance | None = None,
        unlabeled: Unlabeled | None = None,
    ):
        super().__init__()
        self.student = student
        self.family = build_family(student)
        self.check_student(type(student))
        self.heads = heads
        # No nn.Module: they stay outside parameters() and state_dict().
        one = {"": teacher} if isinstance(teacher, Teacher) else teacher
        self.teachers: dict[str, Teacher] = dict(one or {})
        self.balance = balance
        self.unlabeled = unlabeled

    @classmethod
    def check_student(cls, architecture: type[nn.Module]) -> None:
        """Raise ConfigError if this class cannot distil students of an architecture."""
        base = cls.family_type.architecture
        if not issubclass(architecture, base):
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE {cls.__name__} distils {base.__name__} students, not "
                f"{architecture.__name__}; change it or MODEL.DISTILL.STUDENT_ARCHITECTURE."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        student = META_ARCH_REGISTRY.get(student_architecture(cfg))(cfg)
        teachers: dict[str, Teacher] = {}
        heads, balance, unlabeled = nn.ModuleDict(), None, None
        if cfg.MODEL.DISTILL.HEADS:
            # They would shift torch's global random state, and with it the student's training.
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(max(cfg.SEED, 0))
                teachers = build_teachers(cfg)
                infos = infos_by_teacher(cfg, build_family(student), teachers)
                heads = build_all_heads(cfg, infos)
                described, _ = next(iter(infos.values()))
                balance = build_balance(cfg, described, heads)
                unlabeled = build_unlabeled(cfg, infos, heads)
        own = {"student": student, "heads": heads, "unlabeled": unlabeled}
        return {**own, "teacher": teachers, "balance": balance}

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, the first one if there are several, or None."""
        return next(iter(self.teachers.values()), None)

    @property
    def device(self) -> torch.device:
        return self.student.device  # type: ignore[return-value]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return losses in training and predictions in evaluation, as detectron2's networks do.

        Args:
            batched_inputs: in training, all images are labelled, or all are unlabelled.
        """
        if not self.training or not self.heads:
            return self.student(batched_inputs)
        if self.unlabeled is None or not is_unlabeled(batched_inputs[0]):
            return self._losses(batched_inputs, self._heads())
        inputs, known = self._with_labels(self.unlabeled, batched_inputs)
        heads = [(name, x) for name, x in self._heads() if name not in self.unlabeled.idle]
        with unlogged(self.student):
            losses = self._losses(inputs, heads, known)
        return self.unlabeled.learned(losses)

    def _with_labels(
        self, unlabeled: Unlabeled, inputs: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], NetworkOutputs | None]:
        """Return unlabelled images with labels, and the teacher's outputs if it made them.

        It is asked for its detections only while something reads the labels.
        """
        read = unlabeled.task_weight() > 0 or any(
            head.reads_labels and head.factor() != 0 for _, head in self._heads()
        )
        if unlabeled.pseudo is None or not read:
            return unlabeled.with_labels(inputs), None
        known = self.detected(self.teachers[unlabeled.teacher], inputs)
        return unlabeled.with_labels(inputs, known), known

    def detected(self, teacher: Teacher, inputs: list[dict[str, Any]]) -> NetworkOutputs:
        """Return a teacher's features and detections of a batch before the student's forward."""
        images = self.family.model.preprocess_image(inputs).tensor
        batch = Batch(inputs, tuple(images.shape[-2:]), device=images.device)
        return teacher.ask(NetworkOutputs(batch), frozenset({"detections"}))

    def _losses(
        self,
        batched_inputs: list[dict[str, Any]],
        heads: Sequence[tuple[str, DistillHead]],
        known: NetworkOutputs | None = None,
    ) -> dict[str, Tensor]:
        """Return the student's own losses and those of some heads.

        Args:
            known: outputs of the teacher that made labels of these images.
        """
        if self.balance is not None:
            self.balance.start({name: head.factor() for name, head in self._heads()})
        student_needs = self.active_needs()
        with self.family.record(student_needs) as recorder:
            losses: dict[str, Tensor] = self.student(batched_inputs)
        batch = self.family.batch(recorder, batched_inputs)
        student = self.family.read(recorder, batch, student_needs)
        answers: dict[str, NetworkOutputs] = {}
        for name, teacher in self.teachers.items():
            if needs := self.active_needs(teacher=name):
                before = known if self.unlabeled and name == self.unlabeled.teacher else None
                answers[name] = teacher.ask(student, needs, self.teacher_maps(name), before)
        for name, head in heads:
            taught_by = answers.get(head.taught_by) if head.needs_teacher else student
            if self.balance is not None and head.factor() > 0:
                own = self.family.read(self.balance.branch(name, recorder), batch, head.needs)
                losses.update(head(own, taught_by, partial(self.balance.weigh, name)))
            else:
                losses.update(head(student, taught_by))
        return losses

    def _heads(self) -> list[tuple[str, DistillHead]]:
        return list(self.heads.items())  # type: ignore[arg-type]

    def heads_of(self, teacher: str = "") -> list[DistillHead]:
        """Return the heads of a teacher; "" is the name of the only one."""
        heads = [head for _, head in self._heads() if head.needs_teacher]
        return [head for head in heads if head.taught_by == teacher]

    def teacher_maps(self, teacher: str = "") -> frozenset[str] | None:
        """Return the names of a teacher's maps that heads read; None: all of them."""
        own = [head.teacher_maps() for head in self.heads_of(teacher)]
        return None if None in own else frozenset().union(*own)  # type: ignore[arg-type]

    def active_needs(self, teacher: str | None = None) -> frozenset[str]:
        """Return the student's outputs that heads with a weight above 0 read at this iteration.

        Args:
            teacher: return the outputs of the teacher of this name instead.
        """
        heads = [x for _, x in self._heads()] if teacher is None else self.heads_of(teacher)
        return frozenset().union(*(head.needs for head in heads if head.factor() != 0))


@META_ARCH_REGISTRY.register()
class DistillRCNN(DistillModel):
    """Students: GeneralizedRCNN (Faster, Mask, Cascade) and PanopticFPN."""

    family_type = RCNNFamily
    student_architecture = "GeneralizedRCNN"


@META_ARCH_REGISTRY.register()
class DistillRetinaNet(DistillModel):
    """Students: every ``DenseDetector`` (RetinaNet, FCOS, ATSS, GFL, RTMDet, YOLOX, ...)."""

    family_type = DenseFamily
    student_architecture = "RetinaNet"


@META_ARCH_REGISTRY.register()
class DistillSemanticSegmentor(DistillModel):
    """Students: SemanticSegmentor."""

    family_type = SemanticFamily
    student_architecture = "SemanticSegmentor"


def build_distill_model(cfg: CfgNode) -> nn.Module:
    """Build the network that ``cfg`` trains, as detectron2's ``build_model`` does.

    It is a :class:`DistillModel` if ``MODEL.DISTILL.HEADS`` is not empty. So
    ``MODEL.META_ARCHITECTURE`` may be that of the plain student, or a ``Distill*`` one.

    Raises:
        ConfigError: a network cannot be built, or a head cannot compare student and teacher.
    """
    _log_distillation(cfg)
    with building("student"):
        if cfg.MODEL.META_ARCHITECTURE in distill_architectures() or not cfg.MODEL.DISTILL.HEADS:
            return build_model(cfg)
        return DistillModel(cfg).to(cfg.MODEL.DEVICE)


def build_student(cfg: CfgNode) -> nn.Module:
    """Build the plain student of ``cfg``, without teacher and heads.

    Raises:
        ConfigError: it cannot be built.
    """
    with building("student"):
        return build_model(student_config(cfg))


def _log_distillation(cfg: CfgNode) -> None:
    """Log whether ``cfg`` distils; the heads may come from a ``_BASE_``."""
    heads = cfg.MODEL.DISTILL.HEADS
    files = [one.cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE for one in one_per_teacher(cfg)]
    teacher = f"the teacher{'s' if len(files) > 1 else ''} {', '.join(filter(None, files))}"
    if heads:
        mode = balance_mode(cfg)
        logger.info(
            "Distillation: %s learns with MODEL.DISTILL.HEADS %s from %s. BALANCE.MODE is %s: %s",
            *(student_architecture(cfg), ", ".join(heads)),
            teacher if teacher_needed(cfg) else "itself, without a teacher",
            *(mode, "the weights " + ("are constants" if mode == "none" else "set themselves")),
        )
    elif any(files):
        logger.warning(
            "MODEL.DISTILL.HEADS is empty: %s is not used. Name a head to use it.", teacher
        )
