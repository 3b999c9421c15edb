"""The distilled student as a detectron2 meta-architecture."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import Tensor, nn

from ..config import (
    balance_mode,
    distill_architectures,
    student_architecture,
    student_config,
    teacher_config,
)
from ..data.datasets import class_names
from ..errors import ConfigError, building
from ..families import DenseFamily, Family, RCNNFamily, SemanticFamily, build_family
from ..heads import DISTILL_HEAD_REGISTRY, DistillHead, build_heads, teacher_needed
from ..structures import Batch, NetworkInfo, NetworkOutputs
from .balance import GradientBalance
from .teacher import Teacher, build_teacher
from .unlabeled import Unlabeled, build_unlabeled, is_unlabeled, unlogged

logger = logging.getLogger(__name__)

UNKNOWN = "unknown teacher class"  # begins the names of classes whose names are unknown


class DistillModel(nn.Module):
    """A stock detectron2 student, a frozen teacher, and heads that compare them.

    In training the student runs its own ``forward``, whose outputs are recorded. The teacher
    computes only the outputs that the heads active at this iteration need. In evaluation the model
    is the student.

    Args:
        student: a plain detectron2 meta-architecture.
        teacher: None if no head needs one.
        heads: :class:`DistillHead` modules by name.
        balance: sets the heads' weights; None: they are those of the config.
        unlabeled: what the student learns from unlabelled images; None: it has none.
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
        teacher: Teacher | None,
        heads: nn.ModuleDict,
        balance: GradientBalance | None = None,
        unlabeled: Unlabeled | None = None,
    ):
        super().__init__()
        self.student = student
        self.family = build_family(student)
        self.check_student(type(student))
        self.heads = heads
        # Neither is an nn.Module: they stay outside parameters() and state_dict().
        self.teacher = teacher
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
        teacher, heads, balance, unlabeled = None, nn.ModuleDict(), None, None
        if cfg.MODEL.DISTILL.HEADS:
            # Teacher and heads would shift torch's global random state, and the student's training.
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(max(cfg.SEED, 0))
                teacher = build_teacher(cfg) if teacher_needed(cfg) else None
                infos = network_infos(cfg, build_family(student), teacher)
                heads = build_heads(cfg, *infos)
                balance = build_balance(cfg, infos[0])
                unlabeled = build_unlabeled(cfg, *infos, heads)
        own = {"student": student, "heads": heads, "unlabeled": unlabeled}
        return {**own, "teacher": teacher, "balance": balance}

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
        if self.teacher is None or unlabeled.pseudo is None or not read:
            return unlabeled.with_labels(inputs), None
        known = self.detected(self.teacher, inputs)
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
            known: outputs of the teacher for these images with features and detections.
        """
        if self.balance is not None:
            self.balance.start({name: head.factor() for name, head in self._heads()})
        student_needs = self.active_needs()
        teacher_needs = self.active_needs(of_teacher=True)
        with self.family.record(student_needs) as recorder:
            losses: dict[str, Tensor] = self.student(batched_inputs)
        batch = self.family.batch(recorder, batched_inputs)
        student = self.family.read(recorder, batch, student_needs)
        teacher = None
        if self.teacher and teacher_needs:
            teacher = self.teacher.ask(student, teacher_needs, self.teacher_maps(), known)
        for name, head in heads:
            taught_by = teacher if head.needs_teacher else student
            if self.balance is not None and head.factor() > 0:
                own = self.family.read(self.balance.branch(name, recorder), batch, head.needs)
                losses.update(head(own, taught_by, partial(self.balance.weigh, name)))
            else:
                losses.update(head(student, taught_by))
        return losses

    def _heads(self) -> list[tuple[str, DistillHead]]:
        return list(self.heads.items())  # type: ignore[arg-type]

    def teacher_maps(self) -> frozenset[str] | None:
        """Return the names of the teacher's maps that heads read; None: all of them."""
        own = [head.teacher_maps() for _, head in self._heads() if head.needs_teacher]
        return None if None in own else frozenset().union(*own)  # type: ignore[arg-type]

    def active_needs(self, of_teacher: bool = False) -> frozenset[str]:
        """Return the student's outputs that heads with a weight above 0 read at this iteration.

        Args:
            of_teacher: return the teacher's outputs instead.
        """
        active = [
            h for _, h in self._heads() if h.factor() != 0 and (h.needs_teacher or not of_teacher)
        ]
        return frozenset().union(*(head.needs for head in active))


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


def build_balance(cfg: CfgNode, student: NetworkInfo) -> GradientBalance | None:
    """Build the balance of the heads that ``cfg`` names, or None if their weights are fixed."""
    node = cfg.MODEL.DISTILL.BALANCE
    if balance_mode(cfg) == "none":
        return None
    heads = {name: DISTILL_HEAD_REGISTRY.get(name) for name in cfg.MODEL.DISTILL.HEADS}
    return GradientBalance(
        {name: cls.authors_weight(student) for name, cls in heads.items()},
        {name: cls.term_strengths(cfg, student) for name, cls in heads.items()},
        {name: cls.balance_share for name, cls in heads.items()},
        ratio=node.RATIO,
        fade=node.FADE,
        max_iter=cfg.SOLVER.MAX_ITER,
    )


def build_student(cfg: CfgNode) -> nn.Module:
    """Build the plain student of ``cfg``, without teacher and heads.

    Raises:
        ConfigError: it cannot be built.
    """
    with building("student"):
        return build_model(student_config(cfg))


def _log_distillation(cfg: CfgNode) -> None:
    """Log whether ``cfg`` distils; the heads may come from a ``_BASE_``."""
    heads, teacher = cfg.MODEL.DISTILL.HEADS, cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE
    if heads:
        mode = balance_mode(cfg)
        logger.info(
            "Distillation: %s learns with MODEL.DISTILL.HEADS %s from %s. BALANCE.MODE is %s: %s",
            *(student_architecture(cfg), ", ".join(heads)),
            f"the teacher {teacher}" if teacher_needed(cfg) else "itself, without a teacher",
            *(mode, "the weights " + ("are constants" if mode == "none" else "set themselves")),
        )
    elif teacher:
        logger.warning(
            "MODEL.DISTILL.HEADS is empty: the teacher %s is not used. Name a head to use it.",
            teacher,
        )


def network_infos(
    cfg: CfgNode, student: Family, teacher: Teacher | None
) -> tuple[NetworkInfo, NetworkInfo | None]:
    """Describe student and teacher to the heads: levels, outputs and class names.

    Args:
        teacher: None if no head needs one.
    """
    names = class_names(cfg, _is_semantic(student))
    if names is None or len(names) != student.num_classes:
        names = tuple(f"class {i}" for i in range(student.num_classes))
    own = student.info("student", names, _semantic_classes(cfg, student, names))
    if teacher is None:
        return own, None
    family = teacher.family
    classes = _teacher_classes(cfg, names, family)
    semantic = _semantic_classes(teacher_config(cfg), family, classes, own.sem_seg_classes)
    known = () if any(x.startswith(UNKNOWN) for x in classes) else classes
    return own, teacher.info(classes, semantic, names if teacher.given_detections else known)


def _semantic_classes(
    cfg: CfgNode, family: Family, classes: tuple[str, ...], student: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return the class names of a semantic head, which is one of two heads in a Panoptic FPN.

    Args:
        cfg: config of the network.
        classes: class names of the network; a network without boxes has only semantic classes.
        student: names for a teacher whose own names are unknown.
    """
    if family.sem_seg_shape is None or _is_semantic(family):
        return classes if _is_semantic(family) else ()
    number = family.model.sem_seg_head.predictor.out_channels
    named = class_names(cfg, semantic=True), student
    unknown = UNKNOWN if student else "class"
    return next(
        (x for x in named if x and len(x) == number),
        tuple(f"{unknown} {i}" for i in range(number)),
    )


def _is_semantic(family: Family) -> bool:
    """Return whether the network predicts semantic classes only, without instances."""
    return "rois" not in family.outputs and "sem_seg" in family.outputs


def _teacher_classes(cfg: CfgNode, student: tuple[str, ...], teacher: Family) -> tuple[str, ...]:
    """Return the teacher's class names: given, its own, of its training set, or the student's."""
    number = teacher.num_classes
    given = tuple(cfg.MODEL.DISTILL.TEACHER.CLASSES)
    if not number and "detections" in teacher.outputs:
        return given  # it does not say how many classes it detects
    if given and len(given) != number:
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.CLASSES lists {len(given)} names, but the teacher predicts "
            f"{number} classes."
        )
    own = given or teacher.classes or class_names(teacher_config(cfg), _is_semantic(teacher))
    if own and len(own) == number:
        return own
    if number == len(student):
        logger.warning("The teacher's class names are unknown; assuming those of the student.")
        return student
    # Only heads that compare predictions need names, and those heads refuse these.
    return tuple(f"{UNKNOWN} {i}" for i in range(number))
