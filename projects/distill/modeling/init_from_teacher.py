"""A student that starts with the teacher's neck and head (as in FGD and MGD)."""

import logging
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import ConfigError

logger = logging.getLogger(__name__)

INHERITED_PARTS = ("neck", "head")
# Predictors with an output a class, of detectron2's heads and of those here.
_OF_CLASSES = re.compile(r"cls_score\.|box_predictor(\.\d+)?\.bbox_pred\.|\.predictor\.")
_BOTTOM_UP = ("backbone.bottom_up.", "backbone.fpn.bottom_up.")  # of detectron2's FPN, of PAFPN


@torch.no_grad()
def inherit(
    student: nn.Module, teacher: nn.Module, parts: Iterable[str], same_classes: bool = True
) -> list[str]:
    """Copy the teacher's weights and statistics into the student where name and shape agree.

    The neck is what a backbone has beside its bottom-up, the head all that is no backbone. What
    does not fit, such as a lateral convolution of another backbone or a predictor of other
    classes, keeps the student's own values and is logged.

    Args:
        student, teacher: detectron2 networks.
        parts: of :data:`INHERITED_PARTS`.
        same_classes: both predict the same classes in the same order. If not, predictors of
            classes do not fit, whatever their shape.

    Returns:
        Names of the tensors that were copied.

    Raises:
        ConfigError: nothing of a part fits.
    """
    copied = []
    source = teacher.state_dict()
    for part in parts:
        own = _tensors(student, part)
        comparable = [k for k in own if same_classes or not _OF_CLASSES.search(k)]
        fits = [name for name in comparable if _fits(own[name], source.get(name))]
        if not fits:
            raise ConfigError(
                f"MODEL.DISTILL.INHERIT: nothing of the student's {part} ({len(own)} tensors) has "
                f"the name and shape of something in the teacher; remove '{part}' or take a "
                "teacher of the same kind."
            )
        for name in fits:
            own[name].copy_(source[name])
        left = [name for name in own if name not in fits]
        logger.info("The student's %s starts with %d tensors of the teacher's", part, len(fits))
        if left:
            logger.warning("Its %s keeps %d that do not fit: %s", part, len(left), ", ".join(left))
        copied += fits
    return copied


def _tensors(model: nn.Module, part: str) -> dict[str, Tensor]:
    """What a part of a network has in its state dict; a plain backbone has no neck."""
    state = model.state_dict()
    if part == "head":
        return {name: x for name, x in state.items() if not name.startswith("backbone.")}
    if not any(name.startswith(_BOTTOM_UP) for name in state):
        return {}
    inside = {name: x for name, x in state.items() if name.startswith("backbone.")}
    return {name: x for name, x in inside.items() if not name.startswith(_BOTTOM_UP)}


def _fits(x: Tensor, other: Tensor | None) -> bool:
    return other is not None and x.shape == other.shape
