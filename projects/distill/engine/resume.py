"""Differences between a checkpoint and the training that is to continue from it."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.solver import LRScheduler

from ..config.resume import changed_values, takes_effect
from ..errors import WeightsError
from ..section import is_number
from ..utils.text import shortened

logger = logging.getLogger(__name__)

Changes = Mapping[str, tuple[Any, Any]]
"""Old and new value of config keys."""


def log_changes(changes: Changes, iteration: int) -> None:
    """Log the keys of the config that take effect from an iteration on."""
    for key, (old, new) in changes.items():
        logger.warning("Iteration %d: %s is now %s; it was %s", iteration, key, new, old)


def checked_changes(path: str, state: Mapping[str, Any], own: Mapping[str, Any]) -> Changes:
    """Return the keys whose new value takes effect from the next iteration on.

    Args:
        path: file of the checkpoint.
        state: state of the trainer in the checkpoint.
        own: values of this training, see :func:`distill.config.resume.training_values`.

    Raises:
        WeightsError: other keys have changed.
    """
    if "config" not in state:
        logger.warning(
            "'%s' was written by a version that kept no config in it: that this training has the "
            "same config is not checked",
            path,
        )
        return {}
    changes = changed_values(state["config"], own)
    refused = [
        f"{key} is {new!r:.80} but was {old!r:.80}"
        for key, (old, new) in changes.items()
        if not takes_effect(key)
    ]
    if refused:
        raise WeightsError(
            f"'{path}' is of another config: {shortened(refused, 3, '; ')}; set them as they were, "
            "or start anew in another OUTPUT_DIR, where MODEL.WEIGHTS may be this file."
        )
    return changes


def schedule_misfits(
    state: Mapping[str, Any], iteration: int, scheduler: LRScheduler
) -> Iterator[str]:
    """Yield what is wrong with the saved state of a learning-rate schedule.

    Args:
        state: its state in the checkpoint; empty if a user's schedule has none.
        iteration: last iteration before the checkpoint.
        scheduler: schedule of this training.
    """
    if state.get("last_epoch", iteration + 1) != iteration + 1:
        yield f"the learning rate is of iteration {state['last_epoch']!r:.40}"
    rates = state.get("base_lrs", scheduler.base_lrs)
    if len(rates) != len(scheduler.base_lrs) or not all(map(is_number, rates)):
        yield f"base_lrs of the schedule is {rates!r:.80}"
