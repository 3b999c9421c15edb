"""The teacher: frozen, outside the student's module tree, loaded strictly.

It is a plain object, not an ``nn.Module``: so it is absent from ``parameters()``,
``state_dict()``, the optimizer, DistributedDataParallel and ``.train()``.
"""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from ..checkpoint.load import load_strictly
from ..config import building, student_config, teacher_config
from ..errors import ConfigError
from ..families import Family, build_family
from ..structures import Batch, NetworkOutputs

logger = logging.getLogger(__name__)


class Teacher:
    """A frozen network that answers questions about the student's batch.

    Args:
        family: the probe over the teacher's network.
        input_format: channel order that the teacher wants ("BGR", "RGB", ...).
        student_format: channel order of the pictures in ``batched_inputs``.

    Raises:
        ConfigError: one channel order cannot be turned into the other.
    """

    def __init__(self, family: Family, *, input_format: str, student_format: str):
        self.family = family
        self.model = family.model.eval().requires_grad_(False)
        formats = {input_format, student_format}
        if len(formats) > 1 and formats != {"BGR", "RGB"}:
            raise ConfigError(
                f"The teacher's INPUT.FORMAT {input_format} cannot be made from the student's "
                f"{student_format}; both must be BGR or RGB, or the same."
            )
        self.flip_channels = len(formats) > 1

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for backward
    def ask(self, student: NetworkOutputs, needs: frozenset[str]) -> NetworkOutputs:
        """The teacher's own ``needs`` for the student's batch and boxes."""
        batch = student.batch
        device = next(iter(student.features.values())).device
        if self.model.device != device:
            self.model.to(device)
        return self.family.ask(self.preprocess(batch), student, needs)

    def preprocess(self, batch: Batch) -> Tensor:
        """The student's pictures in the teacher's channel order, mean, std and padding."""
        images = [x["image"] for x in batch.inputs]
        if self.flip_channels:
            images = [x.flip(0) for x in images]
        return self.family.preprocess(images, batch.padded_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # a copy of the student (an average of its weights, say) shares the teacher


def build_teacher(cfg: CfgNode, *, trained: bool = True) -> Teacher:
    """Build the teacher that ``cfg.MODEL.DISTILL.TEACHER`` describes and load its weights.

    Args:
        trained: False: of random weights, to learn what could be distilled from it.

    Raises:
        ConfigError, WeightsError: the description or the file cannot work.
    """
    config = student_config(teacher_config(cfg))
    config.defrost()
    config.MODEL.DEVICE = "cpu"  # it follows the student's features
    with building("teacher"):
        model = build_model(config)
    if trained:
        load_strictly(
            model,
            config.MODEL.WEIGHTS,
            "MODEL.DISTILL.TEACHER.WEIGHTS",
            allow_pickle=cfg.MODEL.ALLOW_PICKLE,
        )
        logger.info("Teacher: %s from %s", type(model).__name__, config.MODEL.WEIGHTS)
    return Teacher(
        build_family(model),
        input_format=config.INPUT.FORMAT,
        student_format=cfg.INPUT.FORMAT,
    )
