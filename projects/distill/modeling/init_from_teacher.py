"""A student that starts with the teacher's neck and head, as in FGD and MGD."""

import logging
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..checkpoint.load import BOTTOM_UP
from ..errors import ConfigError

logger = logging.getLogger(__name__)

# Predictors with one output per class, of detectron2's heads and of this package's.
_OF_CLASSES = re.compile(r"cls_score\.|box_predictor(\.\d+)?\.bbox_pred\.|\.predictor\.")


@torch.no_grad()
def init_from_teacher(
    student: nn.Module, teacher: nn.Module, parts: Iterable[str], same_classes: bool = True
) -> list[str]:
    """Copy the teacher's weights and statistics into the student where name and shape agree.

    The neck is the backbone without its bottom-up network; the head is everything outside the
    backbone. A tensor that does not fit keeps the student's own values and is logged. This
    happens to lateral convolutions of another backbone and to predictors of other classes.

    Args:
        student, teacher: detectron2 networks.
        parts: "neck", "head" or both, as in ``MODEL.DISTILL.INHERIT``.
        same_classes: both predict the same classes in the same order. If not, class predictors
            do not fit, whatever their shape.

    Returns:
        Names of the tensors that were copied.

    Raises:
        ConfigError: no tensor of a part fits.
    """
    copied = []
    source = teacher.state_dict()
    for part in parts:
        own = _tensors(student, part)
        comparable = [k for k in own if same_classes or not _OF_CLASSES.search(k)]
        fits = [name for name in comparable if _fits(own[name], source.get(name))]
        if not fits:
            raise ConfigError(
                f"MODEL.DISTILL.INHERIT: no tensor of the student's {part} ({len(own)} tensors) "
                f"has the name and shape of one of the teacher; remove '{part}', or choose "
                "another teacher."
            )
        for name in fits:
            own[name].copy_(source[name])
        left = [name for name in own if name not in fits]
        logger.info("The student's %s starts with %d tensors of the teacher", part, len(fits))
        if left:
            logger.warning("Its %s keeps %d that do not fit: %s", part, len(left), ", ".join(left))
        copied += fits
    return copied


def _tensors(model: nn.Module, part: str) -> dict[str, Tensor]:
    """Return the state dict of a part of a network; a backbone without an FPN has no neck."""
    state = model.state_dict()
    if part == "head":
        return {name: x for name, x in state.items() if not name.startswith("backbone.")}
    if not any(name.startswith(BOTTOM_UP) for name in state):
        return {}
    inside = {name: x for name, x in state.items() if name.startswith("backbone.")}
    return {name: x for name, x in inside.items() if not name.startswith(BOTTOM_UP)}


def _fits(x: Tensor, other: Tensor | None) -> bool:
    return other is not None and x.shape == other.shape
