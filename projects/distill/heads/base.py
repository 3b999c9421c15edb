"""Base class and registry of distillation heads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..errors import ConfigError
from ..losses.reduce import connected_zero
from ..section import Key, Section, at_least
from ..structures import NetworkInfo, NetworkOutputs
from ..utils.text import choices
from ..utils.training import current_iteration

Terms = dict[str, Tensor]
"""Scalar losses by the name of the term."""

Losses = Mapping[str, Tensor | Terms]
"""Unweighted losses of a head by part, each a scalar or the sum of its terms."""

DISTILL_HEAD_REGISTRY = Registry("DISTILL_HEAD")
DISTILL_HEAD_REGISTRY.__doc__ = """
Registry of distillation heads.

A registered class is called as ``cls(cfg, student, teacher)`` with the whole config and a
:class:`~distill.structures.NetworkInfo` for each network; it must be a :class:`DistillHead`.
Its keys are in ``MODEL.DISTILL.<NAME>``, the class name in upper case.
"""


class DistillHead(nn.Module):
    """Compare outputs of student and teacher, and return named, weighted losses.

    A subclass writes :meth:`losses` and declares its config keys in ``section``, on top of those of
    its bases. Each key is an argument of the constructor, in lower case. The schedule, connected
    zeros and names are here.

    Args:
        weight: factor of the losses; 0 switches the head off.
        warmup_iters: iterations over which the factor rises linearly from 0.
        stop_iter: iteration from which the head is off; 0 means never.
    """

    section: ClassVar[Section] = Section(
        WEIGHT=Key(1.0, "factor of the head's losses; 0 switches the head off", at_least(0)),
        WARMUP_ITERS=Key(0, "iterations in which the factor rises linearly from 0", at_least(0)),
        STOP_ITER=Key(0, "iteration from which the head is off; 0: never", at_least(0)),
    )
    """The head's config keys."""

    needs: frozenset[str] = frozenset()
    """Fields of :class:`NetworkOutputs` that both networks must produce."""

    needs_teacher: ClassVar[bool] = True
    """False: the student teaches itself. No teacher is configured, loaded or asked for it."""

    reads_labels: bool = False
    """True if the losses read labels of the images: objects, or semantic labels. It is also True if
    they read boxes that the student samples by labels."""

    balance_share: ClassVar[float] = 1.0
    """Share of ``MODEL.DISTILL.BALANCE.RATIO`` that the head gets while its WEIGHT is the default.

    0.1 for losses of relations or attention: they leave most of a cell's values open, and the whole
    ratio hinders the task. 0.01 for a student that teaches itself.
    """

    rpn_share: ClassVar[float] = 1.0
    """The same share where the student's dense head is an RPN.

    0.1 for losses that follow the RPN alone. With the whole ratio, its task takes the student's
    features from the box head, and an R-CNN gets worse.
    """

    least_epochs: ClassVar[int] = 0
    """Epochs below which the doctor warns of the head: shorter trainings got worse by it."""

    taught_by: str = ""
    """Name of the head's teacher in ``MODEL.DISTILL.TEACHERS``; "" if there is only one."""

    parts: tuple[str, ...] = ("",)
    """Keys of the dict of :meth:`losses`; "" if there is only one loss. All are returned at every
    iteration, because loggers would go on showing the last value of a missing one."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        inherited: Section = super(cls, cls).section  # type: ignore[misc]
        cls.section = vars(cls).get("section", Section()).on_top_of(inherited)

    @configurable
    def __init__(self, *, weight: float = 1.0, warmup_iters: int = 0, stop_iter: int = 0):
        super().__init__()
        self.weight = weight
        self.warmup_iters = warmup_iters
        self.stop_iter = stop_iter

    @classmethod
    def from_config(cls, cfg: CfgNode, student: NetworkInfo, teacher: Any) -> dict[str, Any]:
        return {key.lower(): x for key, x in cls.config_values(cfg, student).items()}

    @property
    def name(self) -> str:
        """Name of the class; with several teachers ``<class>@<teacher>``."""
        return f"{type(self).__name__}{'@' if self.taught_by else ''}{self.taught_by}"

    @classmethod
    def config_node(cls, cfg: CfgNode) -> CfgNode:
        """Return the head's section of the config."""
        return cfg.MODEL.DISTILL[cls.__name__.upper()]

    @classmethod
    def config_values(cls, cfg: CfgNode, student: NetworkInfo) -> CfgNode:
        """Return the values of the head's keys, with the authors' values for this student."""
        return cls.section.values_for(cls.config_node(cfg), student.kinds)

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Raise ConfigError if values of the config do not fit together.

        Each value of ``section`` has been checked before by its own rule.
        """
        node, terms = cls.config_node(cfg), cls.section.terms
        if terms and not any(node[key] for key in terms):
            raise ConfigError(
                f"MODEL.DISTILL.{cls.__name__.upper()}: {', '.join(terms)} are all 0; set one of "
                "them above 0, or WEIGHT 0.0 to switch the head off."
            )

    @classmethod
    def missing_outputs(cls, student: NetworkInfo, teacher: NetworkInfo | None) -> str | None:
        """Return why a network lacks outputs in ``needs``, or None."""
        if teacher is None and cls.needs_teacher:
            return "it compares with a teacher, but no teacher is configured"
        for net in (student, teacher) if teacher and cls.needs_teacher else (student,):
            missing = cls.needs - net.outputs
            if missing:
                return (
                    f"it compares {', '.join(sorted(missing))}, which the {net.name} "
                    f"({net.kind}) does not produce"
                )
        return None

    @classmethod
    def problem(cls, student: NetworkInfo, teacher: Any) -> str | None:
        """Return why this head cannot compare these two networks, or None.

        Args:
            student, teacher: :class:`NetworkInfo`; the teacher is None if no head needs one.
        """
        return cls.missing_outputs(student, teacher)

    @classmethod
    def share_of_ratio(cls, student: NetworkInfo) -> float:
        """Return the share of the balance's ratio that the head gets for this student."""
        follows_rpn = student.dense is not None and student.dense.objectness
        return min(cls.balance_share, cls.rpn_share if follows_rpn else 1.0)

    @classmethod
    def authors_weight(cls, student: NetworkInfo) -> float:
        """Return the authors' value of ``WEIGHT`` for this student."""
        return cls.section["WEIGHT"].for_kinds(student.kinds)

    @classmethod
    def term_strengths(cls, cfg: CfgNode, student: NetworkInfo) -> dict[str, float]:
        """Return the factor of each term over the authors' factor; 1 if that is 0."""
        values = cls.config_values(cfg, student)
        authors = {k: cls.section[k].for_kinds(student.kinds) for k in cls.section.terms}
        return {cls.section[k].term: values[k] / x if x else 1.0 for k, x in authors.items()}

    def teacher_maps(self) -> frozenset[str] | None:
        """Return the names of the teacher's maps that the head reads; None: all of them."""
        return None

    def factor(self) -> float:
        """Return the weight at the current iteration."""
        iteration = current_iteration()
        if self.stop_iter and iteration >= self.stop_iter:
            return 0.0
        if iteration < self.warmup_iters:
            return self.weight * iteration / self.warmup_iters
        return self.weight

    def losses(self, student: NetworkOutputs, teacher: Any) -> Losses:
        """Return unweighted losses by the names in ``parts``, to be summed.

        A loss is a scalar, or a dict of the terms of which it is the sum. The keys of the factors
        of terms name these in ``Key(term=...)``.

        Args:
            student, teacher: :class:`NetworkOutputs`. The teacher of a head without
                ``needs_teacher`` is the student itself. A balance does not scale gradients there.
        """
        raise NotImplementedError

    def forward(
        self,
        student: NetworkOutputs,
        teacher: NetworkOutputs | None,
        weigh: Callable[[Losses], dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Return weighted losses, named ``loss_<head>[/<part>]`` after :attr:`name`.

        Args:
            student: the student's outputs.
            teacher: the teacher's outputs; None while no active head needs them. The student's own
                for a head without ``needs_teacher``.
            weigh: returns the weighted losses by part; None: they are weighted by :meth:`factor`.
        """
        head = f"loss_{self.name.lower()}"
        names = {part: f"{head}/{part}" if part else head for part in self.parts}
        factor = self.factor()
        if factor == 0 or (teacher is None and self.needs_teacher):
            smallest = min(student.features.values(), key=Tensor.numel)
            zero = connected_zero(smallest, parameters=self.parameters())
            return dict.fromkeys(names.values(), zero)
        losses = self.losses(student, teacher)
        weighted = weigh(losses) if weigh else {k: x * factor for k, x in summed(losses).items()}
        return {name: weighted[part] for part, name in names.items()}


def summed(losses: Losses) -> dict[str, Tensor]:
    """Return the losses by part, each the sum of its terms."""
    return {
        part: loss if isinstance(loss, Tensor) else cast(Tensor, sum(loss.values()))
        for part, loss in losses.items()
    }


class NonModuleRef:
    """Holds a value without registering it as a submodule; copies of a head share it."""

    def __init__(self, value: Any):
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "NonModuleRef":
        return self


class StepGenerator(nn.Module):
    """A head's private random generator, which does not change the global random state.

    The trainer reseeds it at every iteration, so checkpoints do not store its state. The generator
    lives on the device that draws, so that nothing is copied or synchronised.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed = max(seed, 0) + comm.get_rank() * 1_000_003  # different in every process
        self._generator: torch.Generator | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device=device).manual_seed(self.seed)
        return self._generator

    def reseed(self, seed: int) -> None:
        self.seed = seed
        if self._generator is not None:
            self._generator.manual_seed(seed)


def head_of(loss: str, heads: Sequence[str]) -> str | None:
    """Return the name of the distillation head of a loss, or None for a task loss."""
    prefixes = {f"loss_{name.lower()}": name for name in heads}
    return prefixes.get(loss.split("/")[0])


def teacher_needed(cfg: CfgNode) -> bool:
    """Return True if a head of ``cfg.MODEL.DISTILL.HEADS`` compares with a teacher."""
    return any(DISTILL_HEAD_REGISTRY.get(n).needs_teacher for n in cfg.MODEL.DISTILL.HEADS)


def build_heads(
    cfg: CfgNode,
    student: NetworkInfo,
    teacher: NetworkInfo | None,
    names: Sequence[str] | None = None,
) -> nn.ModuleDict:
    """Build the heads that ``cfg.MODEL.DISTILL.HEADS`` names, in that order.

    Args:
        teacher: None if no head needs one.
        names: build only these heads; None: all of them.

    Raises:
        ConfigError: if a head cannot compare these networks; the message names heads that can.
    """
    heads = nn.ModuleDict()
    for name in cfg.MODEL.DISTILL.HEADS if names is None else names:
        cls = DISTILL_HEAD_REGISTRY.get(name)
        problem = cls.problem(student, teacher)
        if problem:
            others = ""
            if teacher is not None:
                working = [n for n, c in DISTILL_HEAD_REGISTRY if not c.problem(student, teacher)]
                others = f"; heads that do: {choices(name, working) if working else 'none'}"
            raise ConfigError(
                f"MODEL.DISTILL.HEADS: {name} does not work here because {problem}{others}."
            )
        heads[name] = cls(cfg, student, teacher)
    return heads


def first_phases(cfg: CfgNode) -> dict[str, int]:
    """Return the lengths of the first phases of all heads, by their keys ``*_ITERS``."""
    node = cfg.MODEL.DISTILL
    return {
        f"MODEL.DISTILL.{head.upper()}.{key}": value
        for head in node.HEADS
        for key, value in node[head.upper()].items()
        if key.endswith("_ITERS")
    }


def unfinished_phases(cfg: CfgNode) -> list[str]:
    """Return a warning for each first phase that outlasts the training."""
    last = cfg.SOLVER.MAX_ITER
    return [
        f"{key} is {value} and SOLVER.MAX_ITER {last}: what follows this phase is never reached."
        for key, value in first_phases(cfg).items()
        if value >= last
    ]


def short_trainings(cfg: CfgNode, images: int) -> list[str]:
    """Return a warning for each head that needs a longer training.

    Args:
        cfg: the whole config.
        images: number of training images.
    """
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / images
    least = {name: DISTILL_HEAD_REGISTRY.get(name).least_epochs for name in cfg.MODEL.DISTILL.HEADS}
    return [
        f"{name} made students worse in trainings of a few epochs, and this one has {epochs:.1f}; "
        f"train at least {number}, or take another head."
        for name, number in least.items()
        if epochs < number
    ]
