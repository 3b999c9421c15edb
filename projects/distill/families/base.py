"""Base class of families: read a student's outputs, ask a teacher for its own."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..errors import ConfigError
from ..structures import Batch, NetworkInfo, NetworkOutputs
from .recorder import Recorder, record

T = TypeVar("T")


def whole_images(images: Tensor) -> ImageList:
    """Return padded (N, C, H, W) images as detectron2's list, each of the padded size."""
    return ImageList(images, [tuple(images.shape[-2:])] * len(images))


class Family:
    """A network whose outputs can be read in its own forward, or asked for.

    A subclass names the modules of its family. It serves a student, whose forward is recorded, and
    a teacher, whose public submodules are called. A teacher is never run through its ``forward``.
    Dense inference would rewrite recorded outputs (``sigmoid_``), training mode would update
    statistics, and both would compute outputs that no head reads.
    """

    architecture: ClassVar[type[nn.Module]] = nn.Module

    def __init__(self, model: nn.Module):
        self.model: Any = model

    @property
    def outputs(self) -> frozenset[str]:
        """Names of the :class:`NetworkOutputs` fields that this network can fill."""
        return frozenset({"features", "shallow"} if self.shallow_names else {"features"})

    @property
    def shallow_names(self) -> dict[str, str]:
        """Backbone outputs that are the shallow maps of others, by the name of the deep one."""
        return getattr(self.model.backbone, "shallow_features", {})

    @property
    def feature_shapes(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each of ``NetworkOutputs.features``."""
        return self._split(self.model.backbone.output_shape())[0]

    @property
    def sem_seg_shape(self) -> ShapeSpec | None:
        """Channels and stride of the semantic head's features; None without such a head."""
        if "sem_seg" not in self.outputs:
            return None
        head = self.model.sem_seg_head
        return ShapeSpec(channels=head.predictor.in_channels, stride=head.common_stride)

    def _split(self, outputs: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
        """Split the backbone's outputs into features and shallow maps."""
        shallow = {deep: outputs[name] for deep, name in self.shallow_names.items()}
        names = set(self.shallow_names.values())
        return {k: v for k, v in outputs.items() if k not in names}, shallow

    def joined(
        self, features: Mapping[str, Tensor], shallow: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the backbone's outputs, of which features and shallow maps are the two parts."""
        names = self.shallow_names
        return {**features, **{names[deep]: x for deep, x in shallow.items()}}

    def _features(self, batch: Batch, outputs: Mapping[str, Tensor]) -> NetworkOutputs:
        features, shallow = self._split(outputs)
        return NetworkOutputs(batch, features=features, shallow=shallow)

    @property
    def num_classes(self) -> int:
        """Number of (foreground) classes that this network predicts."""
        return self.model.num_classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names that the network itself has; empty for those that detectron2 builds."""
        return ()

    def info(
        self, name: str, classes: tuple[str, ...], sem_seg_classes: tuple[str, ...] = ()
    ) -> NetworkInfo:
        """Return the facts from which heads are built.

        Args:
            name: "student" or "teacher".
            classes: names of its classes.
            sem_seg_classes: names of the classes of its semantic head.
        """
        return NetworkInfo(
            name=name,
            kinds=tuple(kind.__name__ for kind in type(self.model).__mro__),
            features=self.feature_shapes,
            outputs=self.outputs,
            classes=classes,
            sem_seg=self.sem_seg_shape,
            sem_seg_classes=sem_seg_classes,
            shallow=tuple(self.shallow_names),
            inner=tuple(getattr(self.model.backbone, "inner_features", ())),
            detects_masks="masks" in self.outputs,
        )

    def recorded_modules(self, needs: Collection[str]) -> list[str]:
        """Return the modules to record for :meth:`read`; the backbone is always one."""
        return ["backbone"]

    def read(self, recorder: Recorder, batch: Batch, needs: Collection[str]) -> NetworkOutputs:
        """Return the student's outputs in a recorded forward."""
        return self._features(batch, recorder["backbone"].output)

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return all outputs of the backbone for (N, C, H, W) preprocessed images."""
        maps: dict[str, Tensor] = self.model.backbone(images)
        return maps

    def ask(
        self,
        images: Tensor,
        student: NetworkOutputs,
        needs: Collection[str],
        known: Mapping[str, Tensor] | None = None,
    ) -> NetworkOutputs:
        """Return the teacher's outputs for the student's batch and boxes; call it in ``no_grad``.

        Args:
            images: (N, C, H, W) preprocessed for this network, at least of the padded size.
            student: the student's outputs, for whose boxes the teacher is asked.
            needs: fields of the outputs to fill.
            known: outputs of the backbone, at least those that are needed; None: it computes them.
        """
        maps = self.maps(images) if known is None else known
        outputs = self._features(student.batch, maps)
        self.answer(images, student, outputs, needs)
        return outputs

    def answer(
        self,
        images: Tensor,
        student: NetworkOutputs,
        outputs: NetworkOutputs,
        needs: Collection[str],
    ) -> None:
        """Fill the fields of a teacher's outputs that come after its backbone.

        Args:
            images, student, needs: see :meth:`ask`.
            outputs: the teacher's outputs, which have its features.
        """

    @contextmanager
    def record(self, needs: Collection[str]) -> Iterator[Recorder]:
        """Record one forward of this network."""
        with record(self.model, self.recorded_modules(needs)) as recorder:
            yield recorder

    def batch(self, recorder: Recorder, inputs: list[dict[str, Any]]) -> Batch:
        """Return the batch as the recorded student saw it."""
        images = recorder["backbone"].args[0]
        instances = [x["instances"].to(images.device) for x in inputs if "instances" in x]
        return Batch(inputs, tuple(images.shape[-2:]), instances, images.device)

    def preprocess(self, inputs: list[Tensor], padded_size: tuple[int, int]) -> Tensor:
        """Normalise, pad and batch images for this network.

        A network with a ``pad_value`` is padded before it is normalised.

        Args:
            inputs: one (C, H, W) tensor per image in this network's channel order.
            padded_size: (height, width) that the result covers at least; this network's own
                divisibility or square padding may pad further.

        Returns:
            (N, C, H, W).

        Raises:
            ConfigError: if the padded size exceeds the fixed square that this network pads to.
        """
        model = self.model
        images = [x.to(model.device) for x in inputs]
        pad_value = getattr(model, "pad_value", None)
        if pad_value is None:
            images = [(x - model.pixel_mean) / model.pixel_std for x in images]
        # The first image, padded, carries the whole batch to the padded size.
        first = images[0]
        images[0] = first.new_full((len(first), *padded_size), pad_value or 0.0)
        images[0][:, : first.shape[1], : first.shape[2]] = first
        padding = model.backbone.padding_constraints
        square = padding.get("square_size", 0)
        if 0 < square < max(padded_size):  # detectron2 would cut the image silently
            raise ConfigError(
                f"The teacher pads to {square} x {square} pixels, but its input has "
                f"{padded_size[0]} x {padded_size[1]}; lower MODEL.DISTILL.TEACHER.SCALE or "
                "INPUT.MAX_SIZE_TRAIN, or take another teacher."
            )
        padded = ImageList.from_tensors(
            images, model.backbone.size_divisibility, pad_value or 0.0, padding
        ).tensor
        return padded if pad_value is None else (padded - model.pixel_mean) / model.pixel_std
