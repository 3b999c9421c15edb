"""Outputs of networks in the same form for students and teachers.

Shape shorthand:

    N: images in the minibatch
    R: anchors or points of one level, Hi x Wi x Ai
    Ri: boxes of image i; ΣRi over the minibatch
    K: foreground classes
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

SEM_SEG_HEAD = "sem_seg_head"
"""Key of a semantic head's features (the input of its predictor) in ``NetworkOutputs.maps``."""

DETECTIONS = "detections"
"""Key of a teacher's detections in dataset dicts and ``batched_inputs``, if a file has them."""

UNLABELED = "unlabeled"
"""Key of ``batched_inputs`` that is True for images of ``DATASETS.UNLABELED``."""


@dataclass
class Batch:
    """Minibatch of student and teacher.

    Attributes:
        inputs: detectron2's ``batched_inputs``; ``image`` is (C, H, W) in the student's format.
        padded_size: (height, width) of the student's padded input in pixels. All boxes are in
            pixels of this input.
        instances: ground truth on the student's device; empty for semantic segmentation.
        device: device of the student.
    """

    inputs: list[dict[str, Any]]
    padded_size: tuple[int, int]
    instances: list[Instances] = field(default_factory=list)
    device: torch.device | str = "cpu"

    @property
    def boxes(self) -> list[Tensor]:
        """Ground-truth boxes, one (Ri, 4) XYXY tensor per image."""
        return [x.gt_boxes.tensor for x in self.instances]

    @cached_property
    def sem_seg(self) -> Tensor:
        """Semantic labels (N, H, W) of the padded size; the padding is -1."""
        labels = [x["sem_seg"] for x in self.inputs]
        square = {"square_size": max(self.padded_size)}  # cut to the padded size below
        padded = ImageList.from_tensors(labels, pad_value=-1, padding_constraints=square).tensor
        return padded[:, : self.padded_size[0], : self.padded_size[1]].to(self.device)


@dataclass
class DenseOutputs:
    """Outputs of a dense head; the RPN is the dense head of an R-CNN (K = 1, objectness).

    Attributes:
        logits: one (N, R, K) tensor per level, finest first.
        deltas: one (N, R, D) tensor per level. D is 4, or 4 times the bins of GFL's distributions.
        sizes: (Hi, Wi) of each level in cells.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    sizes: list[tuple[int, int]]


@dataclass
class HeadFeatures:
    """Outputs of the convolutions of a dense head's two subnets, before activations.

    Attributes:
        classes, boxes: (N, C, Hi, Wi) maps of each subnet, by convolution and then by level.
    """

    classes: list[list[Tensor]]
    boxes: list[list[Tensor]]


@dataclass
class DenseTargets:
    """Targets on which the student trains its dense outputs.

    Attributes:
        labels: (N, R) of all levels, in [0, K]; K is background, -1 is ignored.
        boxes: (N, R, 4) XYXY of the matched objects; undefined where no object is matched.
    """

    labels: Tensor
    boxes: Tensor

    def positive(self, num_classes: int) -> Tensor:
        """Return (N, R) bool: True for rows that are trained on an object."""
        return (self.labels >= 0) & (self.labels < num_classes)


@dataclass
class ROIs:
    """Outputs of one box stage on the boxes that the *student* sampled, in the student's order.

    Attributes:
        boxes: one (Ri, 4) tensor per image.
        logits: (ΣRi, K + 1), background last.
        deltas: (ΣRi, K or 1, 4), divided by the weights of the ``box2box_transform``, so that
            stages and networks with different weights are comparable.
        labels: (ΣRi,) indices of the student's classes in [0, K]; K is background.
    """

    boxes: list[Tensor]
    logits: Tensor
    deltas: Tensor
    labels: Tensor


@dataclass
class Masks:
    """Mask logits of the student's foreground instances.

    Attributes:
        boxes: one (Ri, 4) tensor per image.
        logits: (ΣRi, K or 1, M, M).
        labels: (ΣRi,) indices of the student's classes in [0, K).
    """

    boxes: list[Tensor]
    logits: Tensor
    labels: Tensor


@dataclass
class PointMasks:
    """Mask logits of whole images that belong to the points on which the student trains its masks.

    Attributes:
        rows: one (Ri,) tensor per image, indices of points among those of all levels; -1 for none.
        logits: (ΣRi, H, W) on the cells of the finest level.
        labels: (ΣRi,) indices of the student's classes in [0, K]; K for a row without a point.
        sizes: (Hi, Wi) of each level in cells.
    """

    rows: list[Tensor]
    logits: Tensor
    labels: Tensor
    sizes: list[tuple[int, int]]


@dataclass
class SemSeg:
    """Outputs of a semantic head before upsampling.

    Attributes:
        features: (N, C, H, W) input of the last convolution.
        logits: (N, K, H, W).
    """

    features: Tensor
    logits: Tensor


@dataclass
class NetworkOutputs:
    """Outputs of one network for one batch. Fields that were not asked for are empty.

    Attributes:
        features: (N, C, H, W) outputs of the backbone by name.
        shallow: maps of the FPN in an FPN+PAN neck, by the name of the PAN's map of the same level.
        dense_boxes: one (N, R, 4) tensor per level, without gradient: the boxes that ``dense``
            predicts, in pixels of the padded input.
        targets: targets of the student; None for a teacher.
        detections: a teacher's own detections by image, in pixels of the padded input. They have
            pred_boxes and scores. Those of a network with masks have pred_masks, (R, 1, M, M) in
            [0, 1] on the box. Empty for a student, which has none in training.
    """

    batch: Batch
    features: dict[str, Tensor] = field(default_factory=dict)
    shallow: dict[str, Tensor] = field(default_factory=dict)
    dense: DenseOutputs | None = None
    dense_boxes: list[Tensor] = field(default_factory=list)
    head_features: HeadFeatures | None = None
    targets: DenseTargets | None = None
    detections: list[Instances] = field(default_factory=list)
    rois: list[ROIs] = field(default_factory=list)
    masks: Masks | None = None
    point_masks: PointMasks | None = None
    sem_seg: SemSeg | None = None

    @property
    def maps(self) -> dict[str, Tensor]:
        """``features`` and, if recorded, the features of the semantic head."""
        head = {SEM_SEG_HEAD: self.sem_seg.features} if self.sem_seg else {}
        return {**self.features, **head}


def tensors_of(outputs: NetworkOutputs) -> Iterator[Tensor]:
    """Yield all tensors of a network's outputs, without those of its batch."""
    yield from _tensors({name: x for name, x in vars(outputs).items() if name != "batch"})


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | dict):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _tensors(x)
    elif is_dataclass(value):
        yield from _tensors(vars(value))


def in_full_precision(outputs: NetworkOutputs) -> NetworkOutputs:
    """Return a network's outputs with all numbers in float32; the batch is the same."""
    names = [x.name for x in fields(outputs) if x.name != "batch"]
    return replace(outputs, **{name: _floats(getattr(outputs, name)) for name in names})


def _floats(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Boxes):
        return Boxes(value.tensor.float())
    if isinstance(value, list):
        return [_floats(x) for x in value]
    if isinstance(value, dict):
        return {key: _floats(x) for key, x in value.items()}
    if isinstance(value, Instances):
        return Instances(value.image_size, **_floats(value.get_fields()))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{x.name: _floats(getattr(value, x.name)) for x in fields(value)})
    return value


@dataclass(frozen=True)
class DenseLayout:
    """Layout of a dense head: where the rows of its outputs lie in the image, and their encoding.

    Attributes:
        objectness: True for the RPN of an R-CNN, whose only class is every object.
        levels: names of the features that the head reads, finest first.
        strides: size in pixels of a cell of each level.
        anchors: one (A, 4) XYXY tensor per level, relative to the cell's origin, on the CPU.
        offset: distance of the cells' origins from the image's, in strides.
        thresholds: IoU below which an anchor is negative, and from which it is positive.
        box2box_transform: detectron2's transform between anchors and boxes.
        box_dim: numbers that encode a box: 4, or 4 times the bins of a distribution.
        reg_max: last bin of the distribution of a box's side; None without distributions.
        candidates: anchors per level and object that ATSS considers in the assignment.
        subnet_channels: output channels of each convolution of the classification and of the
            regression subnet; None for heads that are not built like a RetinaNetHead.
        centerness: True if the head predicts the centerness of its boxes.
    """

    objectness: bool
    levels: list[str]
    strides: list[float]
    anchors: list[Tensor]
    offset: float
    thresholds: tuple[float, float]
    box2box_transform: Any = None
    box_dim: int = 4
    reg_max: int | None = None
    candidates: int = 9
    subnet_channels: tuple[list[int], list[int]] | None = None
    centerness: bool = False

    @property
    def box_encoding(self) -> tuple[type, Any] | None:
        """Box encoding (transform type and weights), or None if a box is not four numbers."""
        if self.box_dim != 4:
            return None
        transform = self.box2box_transform
        return type(transform), getattr(transform, "weights", None)


@dataclass(frozen=True)
class NetworkInfo:
    """Description of a network that its family provides, from which a head is built.

    Attributes:
        name: "student" or "teacher", for messages.
        kinds: class names of the network and its bases, the network's own first.
        features: channels and stride of each of ``NetworkOutputs.features``. All strides and
            anchors are in the student's pixels.
        outputs: names of the :class:`NetworkOutputs` fields that the family produces.
        classes: class names in the order of the network's outputs, without background.
        sem_seg: channels and stride of the semantic head's features; None without such a head.
        sem_seg_classes: class names in the order of the semantic head's logits.
        shallow: names of the features that have a shallow map in ``NetworkOutputs.shallow``.
        inner: names of the features inside the neck, which are compared only if a config names
            them.
        dense: layout of the dense head; None without such a head.
        last_layers: function that returns the last layers of the dense head, given the number of
            convolutions of each subnet to keep. The layers turn maps before an activation, one list
            of levels per subnet, into (N, R, D) predictions, one tensor per output of the head.
            None if the network has no ``head_features``.
        box_in_features: names of the features from which an R-CNN crops its boxes.
        use_sigmoid_ce: True if an R-CNN scores its boxes by sigmoids.
        detector_levels: names of the features that ``detector_losses`` reads, finest first.
        detector_losses: function that returns the detector's own losses for other backbone maps,
            given by name, and does not change the detector. None if it learns no boxes.
        scale: size of the network's images relative to the student's.
        detection_classes: class names of ``NetworkOutputs.detections``; empty if unknown.
        detects_masks: True if ``NetworkOutputs.detections`` have masks.
    """

    name: str
    kinds: tuple[str, ...]
    features: dict[str, ShapeSpec]
    outputs: frozenset[str]
    classes: tuple[str, ...]
    sem_seg: ShapeSpec | None = None
    sem_seg_classes: tuple[str, ...] = ()
    shallow: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    dense: DenseLayout | None = None
    last_layers: Callable[[int], Callable[..., list[Tensor]]] | None = None
    box_in_features: tuple[str, ...] = ()
    use_sigmoid_ce: bool = False
    detector_levels: tuple[str, ...] = ()
    detector_losses: Callable[..., dict[str, Tensor]] | None = None
    scale: float = 1.0
    detection_classes: tuple[str, ...] = ()
    detects_masks: bool = False

    @property
    def kind(self) -> str:
        """Class name of the network, for messages."""
        return self.kinds[0]

    @property
    def maps(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each of ``NetworkOutputs.maps``."""
        return {**self.features, **({SEM_SEG_HEAD: self.sem_seg} if self.sem_seg else {})}

    @property
    def outer_maps(self) -> dict[str, ShapeSpec]:
        """The maps without those inside the neck."""
        return {name: shape for name, shape in self.maps.items() if name not in self.inner}

    def channels_of(self, levels: Iterable[str]) -> list[int]:
        """Return the different numbers of channels of some features, in ascending order."""
        return sorted({self.features[name].channels for name in levels})

    @property
    def has_boxes(self) -> bool:
        """True if the network is trained on ground-truth boxes."""
        return not self.outputs.isdisjoint({"dense", "rois"})
