"""The teacher: frozen, outside the student's module tree, loaded strictly.

It is a plain object, not an ``nn.Module``. So it is absent from ``parameters()``,
``state_dict()``, the optimizer, DistributedDataParallel and ``.train()``.
"""

import hashlib
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import Tensor

from ..checkpoint.load import load_strictly
from ..config import student_config, teacher_config
from ..errors import ConfigError, building
from ..families import Family, build_family
from ..structures import DETECTIONS, Batch, NetworkInfo, NetworkOutputs, in_full_precision
from ..utils.io import file_hash
from ..utils.text import clause
from .feature_cache import FeatureCache, build_cache
from .rescale import in_student_pixels, rescaled_boxes, rescaled_image, rescaled_padding

logger = logging.getLogger(__name__)


class Teacher:
    """A frozen network that computes its outputs for the student's batch.

    Args:
        family: the teacher's network in its family.
        input_format: channel order of the teacher's images ("BGR", "RGB", ...).
        student_format: channel order of the images in ``batched_inputs``.
        scale: size of the teacher's images relative to the student's. Only this class and its
            family see the teacher's pixels; all outputs are in the student's.
        given_detections: True if the batch has the detections, instead of the network's own.
        dtype: precision of its computations, by autocast, whose results are in float32. None: that
            of the student's forward.
        channels_last: compute in the channels-last memory format. The maps that heads see are
            contiguous.
        cache: keeps the maps of the backbone; None: they are computed in every step.

    Raises:
        ConfigError: one channel order cannot be converted to the other.
    """

    def __init__(
        self,
        family: Family,
        *,
        input_format: str,
        student_format: str,
        scale: float = 1.0,
        given_detections: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        cache: FeatureCache | None = None,
    ):
        self.family = family
        self.scale = scale
        self.given_detections = given_detections
        self.dtype = dtype
        self.channels_last = channels_last
        self.cache = cache
        self.model = family.model.eval().requires_grad_(False)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        formats = {input_format, student_format}
        if len(formats) > 1 and formats != {"BGR", "RGB"}:
            raise ConfigError(
                f"The teacher's INPUT.FORMAT {input_format} cannot be made from the student's "
                f"{student_format}; both must be BGR or RGB, or the same."
            )
        self.flip_channels = len(formats) > 1

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for backward
    def ask(
        self,
        student: NetworkOutputs,
        needs: frozenset[str],
        maps: frozenset[str] | None = None,
        before: NetworkOutputs | None = None,
    ) -> NetworkOutputs:
        """Return the teacher's outputs for the student's batch and boxes.

        Args:
            student: outputs of the student, with its batch.
            needs: names of the outputs to compute.
            maps: names of the features that are read; None: all of them.
            before: outputs for the same batch with all features and detections, which are not
                computed again; None: it has not been asked.
        """
        batch = student.batch
        device = torch.device(batch.device)
        if self.model.device != device:
            self.model.to(device)
        given = self.given_detections and "detections" in needs
        asked = needs - {"detections"} if given else needs
        if before is not None:
            asked = asked - {"detections"}
        with self._precision(device.type):
            outputs = self._asked(self.preprocess(batch), student, asked, maps, before)
        if self.dtype is not None:  # the student's precision may be another
            outputs = in_full_precision(outputs)
        if before is not None:
            outputs.detections = before.detections
        if given:
            outputs.detections = [self._given(x).to(device) for x in batch.inputs]
        return outputs

    def _asked(
        self,
        images: Tensor,
        student: NetworkOutputs,
        needs: frozenset[str],
        maps: frozenset[str] | None,
        before: NetworkOutputs | None,
    ) -> NetworkOutputs:
        """Return the network's outputs in the student's pixels."""
        if before is None:
            known = self._maps(images, student.batch, maps)
        else:
            known = self.family.joined(before.features, before.shallow)
        if self.scale == 1:
            return self.family.ask(images, student, needs, known)
        outputs = self.family.ask(images, rescaled_boxes(student, self.scale), needs, known)
        return rescaled_boxes(outputs, 1 / self.scale)

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        """Open the context in which this network computes on a type of device."""
        if self.dtype is None:
            return nullcontext()
        if self.dtype == torch.float32:
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, self.dtype)

    def _maps(
        self, images: Tensor, batch: Batch, names: frozenset[str] | None
    ) -> dict[str, Tensor]:
        """Return the maps of the backbone, of which a cache has only those that are needed."""
        if self.cache is None:
            return self._computed(images)
        return self.cache.outputs(
            batch, self.map_names(names), images.device, lambda: self._computed(images)
        )

    def _computed(self, images: Tensor) -> dict[str, Tensor]:
        """Return all maps of the backbone, computed."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            maps = self.family.maps(images)
        except RuntimeError as e:
            if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise ConfigError(
                f"MODEL.DISTILL.TEACHER.COMPILE: torch.compile fails ({clause(e)}); set it to "
                "False."
            ) from e
        if self.channels_last:  # losses reshape maps
            maps = {name: x.contiguous() for name, x in maps.items()}
        return maps

    def map_shapes(self, names: frozenset[str] | None) -> list[ShapeSpec]:
        """Return the shapes of :meth:`map_names`, with strides in the student's pixels."""
        shapes = self.model.backbone.output_shape()
        own = (shapes[x] for x in self.map_names(names))
        return [ShapeSpec(channels=x.channels, stride=x.stride / self.scale) for x in own]

    def map_names(self, names: frozenset[str] | None) -> list[str]:
        """Return which outputs of the backbone are needed to read ``names``; None: all."""
        outputs = list(self.model.backbone.output_shape())
        needed = None if self.family.shallow_names else names
        return [x for x in outputs if needed is None or x in needed]

    @staticmethod
    def _given(inputs: dict[str, Any]) -> Instances:
        if DETECTIONS not in inputs:
            raise ConfigError(
                "MODEL.DISTILL.TEACHER.DETECTIONS is set, but the mapper of the training images "
                f"gives no '{DETECTIONS}'; let it move them as "
                "distill.data.detections.DetectionsMapper does."
            )
        found: Instances = inputs[DETECTIONS]
        return found

    def info(
        self,
        classes: tuple[str, ...],
        sem_seg_classes: tuple[str, ...] = (),
        detection_classes: tuple[str, ...] = (),
    ) -> NetworkInfo:
        """Describe the teacher to the heads, with strides and anchors in the student's pixels.

        Args:
            classes, sem_seg_classes: class names of the network.
            detection_classes: class names of its detections; empty if unknown.
        """
        info = self.family.info("teacher", classes, sem_seg_classes)
        info = replace(info, detection_classes=detection_classes)
        if self.given_detections:
            info = replace(info, outputs=info.outputs | {"detections"}, detects_masks=False)
        return in_student_pixels(info, self.scale)

    def preprocess(self, batch: Batch) -> Tensor:
        """Return the student's images in the teacher's order, size, mean, std and padding."""
        images = [self.image(x["image"]) for x in batch.inputs]
        return self.family.preprocess(images, rescaled_padding(batch.padded_size, self.scale))

    def image(self, image: Tensor) -> Tensor:
        """Return one of the student's (C, H, W) images in the teacher's channel order and size."""
        if self.flip_channels:
            image = image.flip(0)
        if self.scale == 1:
            return image
        return rescaled_image(image.to(self.model.device), self.scale)

    @cached_property
    def weights_hash(self) -> str:
        """The sha256 of the names and values of the weights, wherever they were read."""
        digest = hashlib.sha256()
        for name, x in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # a copy of the student (an average of its weights, say) shares the teacher


def build_teacher(cfg: CfgNode, *, trained: bool = True) -> Teacher:
    """Build the teacher that ``cfg.MODEL.DISTILL.TEACHER`` describes and load its weights.

    Args:
        trained: load the weights; if False they are random, to see which heads would work.

    Raises:
        ConfigError, WeightsError: the network cannot be built, or its weights not loaded.
    """
    described = teacher_config(cfg, trained=trained)
    config = student_config(described)
    config.defrost()
    config.MODEL.DEVICE = "cpu"  # it follows the student's features
    whole = described.MODEL.META_ARCHITECTURE != "FeatureExtractor"
    if not whole and "TIMM" in config.MODEL:
        config.MODEL.TIMM = described.MODEL.TIMM  # it may name the weights
    with building("teacher"):
        model = build_model(config)
    if trained and (whole or config.MODEL.WEIGHTS):
        load_strictly(
            model,
            config.MODEL.WEIGHTS,
            "MODEL.DISTILL.TEACHER.WEIGHTS",
            allow_pickle=cfg.MODEL.ALLOW_PICKLE,
        )
        logger.info("Teacher: %s from %s", type(model).__name__, config.MODEL.WEIGHTS)
    node = cfg.MODEL.DISTILL.TEACHER
    teacher = Teacher(
        build_family(model),
        input_format=config.INPUT.FORMAT,
        student_format=cfg.INPUT.FORMAT,
        scale=node.SCALE,
        given_detections=bool(node.DETECTIONS),
        dtype=None if node.DTYPE == "auto" else getattr(torch, node.DTYPE),
        channels_last=node.CHANNELS_LAST,
    )
    if node.COMPILE:
        model.backbone.compile()
    if trained and node.CACHE.DIR:
        teacher.cache = build_cache(cfg, f"{_described(described)}{teacher.weights_hash}")
    return teacher


def _described(config: CfgNode) -> str:
    """Return everything besides its weights on which a teacher's maps depend."""
    model = config.MODEL.clone()
    model.defrost()
    model.WEIGHTS = model.DEVICE = ""
    code = model.MODULE.FUNCTION.rpartition(":")[0] if "MODULE" in model else ""
    source = file_hash(code) if code else ""
    return f"{model.dump()}{config.INPUT.FORMAT}{source}{torch.__version__}"
