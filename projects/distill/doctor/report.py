"""Findings of the doctor as plain data, which ``dataclasses.asdict`` prepares for JSON."""

from dataclasses import dataclass, field


@dataclass
class Weights:
    """Tensors of the student that ``MODEL.WEIGHTS`` filled.

    Attributes:
        file: path or URL; empty: random weights.
        filled, total: number of the student's tensors. Statistics of normalisation are not counted,
            because detectron2 sets them if a file lacks them.
        unfilled: number of tensors that kept their random values, by the first part of their name.
    """

    file: str
    filled: int
    total: int
    unfilled: dict[str, int]


@dataclass
class Setting:
    """Setting of the preprocessing; ``teacher`` is None without a teacher."""

    name: str
    student: str
    teacher: str | None


@dataclass
class Classes:
    """Class names of both networks in the order of their outputs.

    Attributes:
        relation: same | other order | mapped | no name in common.
        shared: number of names that both networks have.
        only_student, only_teacher: names that only one network has.
        known: True if the teacher's names are given; otherwise they are assumed.
    """

    student: list[str]
    teacher: list[str]
    relation: str
    shared: int
    only_student: list[str]
    only_teacher: list[str]
    known: bool


@dataclass
class TensorInfo:
    """Description of a tensor.

    Attributes:
        name: level or stage.
        shape: shape for the first batch.
        stride: pixels of the student per cell; None for boxes.
    """

    name: str
    shape: list[int]
    stride: float | None
    dtype: str


@dataclass
class ComparingHead:
    """Head that compares an output, and the adapter that it applies before."""

    head: str
    adapter: str


@dataclass
class OutputRow:
    """Output of the student and the output of the teacher that it is compared with.

    Attributes:
        output: kind of output, such as "features" or "dense logits".
        student, teacher: one of them is None if the other has no counterpart.
        heads: heads that compare the two.
    """

    output: str
    student: TensorInfo | None
    teacher: TensorInfo | None
    heads: list[ComparingHead] = field(default_factory=list)


@dataclass
class LossRow:
    """Loss at the full weight of its head, averaged over the batches.

    Attributes:
        loss: name in the log. If a head has several losses, their sum comes first, with the name
            ``loss_<head>``.
        head: name of the head; None for the sum of the task losses, which is the first row.
        ratio: loss over task loss; with a balance, gradient over that of the task.
        gradient: L2 norm of the gradient in the student's parameters.
        cosine: cosine with the gradient of the task loss; None if one of the gradients is 0.
    """

    loss: str
    head: str | None
    value: float
    ratio: float
    gradient: float
    cosine: float | None


@dataclass
class BalanceRow:
    """Factor by which the balance will scale a head's gradient, as two batches predict it.

    Attributes:
        tensor: output of the student that the head compares, such as ``backbone.p3``.
    """

    head: str
    tensor: str
    factor: float


@dataclass
class TeacherCost:
    """Cost of a teacher in the training step.

    Attributes:
        seconds: mean time of its answer for one batch.
        parameters_mb: size of its parameters in MiB.
        outputs_mb: size of its answer in MiB, which stays in memory until the backward is done.
    """

    seconds: float
    parameters_mb: float
    outputs_mb: float


@dataclass
class TeacherCheck:
    """Share of the ground truth of two batches that the teacher predicts.

    Attributes:
        measure: "objects found" (share found at IoU >= 0.5 in the right class) or "pixel accuracy".
        value: the share, in [0, 1].
        chance: the same share with the predictions for the other images; for pixels, the share of
            the most frequent class.
        count: number of objects or pixels in classes that the teacher knows.
        by_class: True if classes were compared, which needs a common name.
    """

    measure: str
    value: float
    chance: float
    count: int
    by_class: bool


@dataclass
class TeacherAP:
    """Metrics of the teacher on the first images of a test set, by "task/metric"."""

    dataset: str
    images: int
    metrics: dict[str, float]


@dataclass
class UnlabeledCheck:
    """Objects that the teacher finds in unlabelled images.

    Attributes:
        images: number of images.
        objects: number of detections of at least ``MODEL.DISTILL.UNLABELED.SCORE`` in them.
        empty: number of images without such a detection.
    """

    images: int
    objects: int
    empty: int


@dataclass
class Cost:
    """Cost of the whole training step: forward, backward, optimizer.

    Attributes:
        device: name of the measured device.
        batch: number of images per batch.
        memory_mb: peak memory in MiB, on the GPU or resident in the whole process.
        step_seconds: mean time of a step.
        data_seconds: time to load one batch in one process.
        iterations: ``SOLVER.MAX_ITER`` for this number of processes.
        hours: time of all iterations, without evaluation.
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
    """Registered head, and why it does not work for the two networks.

    Attributes:
        compares: names of the network outputs that it reads.
        problem: why it does not work; None if it works.
    """

    head: str
    compares: list[str]
    needs_teacher: bool
    configured: bool
    problem: str | None


@dataclass
class DoctorReport:
    """Findings of the doctor. Parts that were not examined are empty.

    Attributes:
        student, teacher: class names of the networks; "" without a teacher or with several.
        teacher_weights: file that filled every tensor of the teacher.
        teachers: findings about each of several teachers by its name; empty if there is only one.
        heads: names of ``MODEL.DISTILL.HEADS`` that train.
        notes: remarks, such as checks that were not possible.
        warnings: findings to look at before the training.
        errors: findings that make the training useless.
    """

    student: str = ""
    teacher: str = ""
    teacher_weights: str = ""
    heads: list[str] = field(default_factory=list)
    weights: Weights | None = None
    preprocessing: list[Setting] = field(default_factory=list)
    classes: Classes | None = None
    outputs: list[OutputRow] = field(default_factory=list)
    losses: list[LossRow] = field(default_factory=list)
    balance: list[BalanceRow] = field(default_factory=list)
    teacher_check: TeacherCheck | None = None
    teacher_ap: TeacherAP | None = None
    teacher_cost: TeacherCost | None = None
    unlabeled: UnlabeledCheck | None = None
    cost: Cost | None = None
    registered_heads: list[HeadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    teachers: dict[str, "DoctorReport"] = field(default_factory=dict)
