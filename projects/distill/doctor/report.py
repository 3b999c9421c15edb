"""What the doctor found, as plain data; ``dataclasses.asdict`` makes it JSON."""

from dataclasses import dataclass, field


@dataclass
class Weights:
    """What ``MODEL.WEIGHTS`` gave the student.

    Attributes:
        file: path or URL; empty: random weights.
        filled, total: tensors of the student; statistics of normalisation do not count, because
            detectron2 makes them up where a file lacks them.
        unfilled: number of tensors that kept their random values, by the first part of their name.
    """

    file: str
    filled: int
    total: int
    unfilled: dict[str, int]


@dataclass
class Setting:
    """One setting of the preprocessing; the teacher's is None without a teacher."""

    name: str
    student: str
    teacher: str | None


@dataclass
class Classes:
    """Both networks' class names in the order of their outputs.

    Attributes:
        relation: same | other order | mapped | no name in common.
        shared: number of names that both list.
        only_student, only_teacher: names that the other does not list.
        known: whether the teacher's names are given; if not, they are the student's or invented.
    """

    student: list[str]
    teacher: list[str]
    relation: str
    shared: int
    only_student: list[str]
    only_teacher: list[str]
    known: bool


@dataclass
class Said:
    """One tensor that a network said.

    Attributes:
        name: level or stage.
        shape: of the first batch.
        stride: pixels a cell; None for boxes.
    """

    name: str
    shape: list[int]
    stride: int | None
    dtype: str


@dataclass
class Comparison:
    """Which head compares a tap, through what."""

    head: str
    adapter: str


@dataclass
class Tap:
    """A signal of the student beside what it is compared with; None: nothing corresponds."""

    signal: str
    student: Said | None
    teacher: Said | None
    heads: list[Comparison] = field(default_factory=list)


@dataclass
class LossRow:
    """A loss at the head's full weight, mean of the batches.

    Attributes:
        loss: as it is logged; of a head with several, their sum comes first under ``loss_<head>``.
        head: None for the sum of the task losses, which comes first of all.
        ratio: to the task loss.
        gradient: L2 norm in the student's parameters.
        cosine: with the gradient of the task loss; None where one of the two is 0.
    """

    loss: str
    head: str | None
    value: float
    ratio: float
    gradient: float
    cosine: float | None


@dataclass
class TeacherCheck:
    """How much of the two batches' ground truth the teacher knows.

    Attributes:
        measure: "objects found" (share found at IoU >= 0.5 in the right class) or
            "pixel accuracy".
        value: in [0, 1].
        chance: the same for its predictions of the other pictures; of pixels, the share of the
            most frequent class.
        count: objects or pixels of classes that the teacher knows.
        by_class: whether classes were compared, which needs a common name.
    """

    measure: str
    value: float
    chance: float
    count: int
    by_class: bool


@dataclass
class TeacherAP:
    """The teacher's metrics on the first pictures of a test set, by "task/metric"."""

    dataset: str
    pictures: int
    metrics: dict[str, float]


@dataclass
class Cost:
    """Of the whole training step: forward, backward, optimizer.

    Attributes:
        device: that was measured.
        batch: pictures.
        memory_mb: peak MiB; of the GPU, or resident in the whole process.
        step_seconds: mean.
        data_seconds: to load one batch in one process.
        iterations: ``SOLVER.MAX_ITER`` for this number of processes.
        hours: of all iterations, evaluation excluded.
    """

    device: str
    batch: int
    memory_mb: float
    step_seconds: float
    data_seconds: float
    iterations: int
    hours: float


@dataclass
class HeadRow:
    """A registered head and whether it works for the two networks.

    Attributes:
        compares: the signals that it reads.
        problem: why it does not work; None: it does.
    """

    head: str
    compares: list[str]
    needs_teacher: bool
    configured: bool
    problem: str | None


@dataclass
class Report:
    """Everything that was examined; what was not stays empty.

    Attributes:
        student, teacher: types of the networks; the teacher is empty without one.
        teacher_weights: the file that filled every tensor of the teacher.
        heads: names of ``MODEL.DISTILL.HEADS`` that train.
        notes: what could not be examined, and why.
        warnings: what a person should look at before training.
        errors: what makes the training worthless.
    """

    student: str = ""
    teacher: str = ""
    teacher_weights: str = ""
    heads: list[str] = field(default_factory=list)
    weights: Weights | None = None
    preprocessing: list[Setting] = field(default_factory=list)
    classes: Classes | None = None
    taps: list[Tap] = field(default_factory=list)
    losses: list[LossRow] = field(default_factory=list)
    teacher_check: TeacherCheck | None = None
    teacher_ap: TeacherAP | None = None
    cost: Cost | None = None
    registered_heads: list[HeadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
