"""The bounds of a healthy distillation, and the sentences about what lies beyond them.

The doctor judges two batches by them, the log's alarms the last iterations.
"""

# Distillation loss over task loss. Below, the head changes nothing; above, it is all that trains.
LOWEST_RATIO = 0.001
HIGHEST_RATIO = 10.0
LOWEST_COSINE = -0.5  # between the gradients of distillation and task


def ratio_warning(loss: str, ratio: float) -> str | None:
    """A sentence if a distillation loss is too small or too large beside the task loss, or None.

    Args:
        loss: of a head that has a weight at this iteration: ``fitnet``, ``loss_fitnet/p2``.
        ratio: that loss over the task loss; one that is not finite is another matter.
    """
    if LOWEST_RATIO <= ratio <= HIGHEST_RATIO or not abs(ratio) < float("inf"):
        return None
    bound, verb = (LOWEST_RATIO, "raise") if ratio < LOWEST_RATIO else (HIGHEST_RATIO, "lower")
    side = "below" if ratio < LOWEST_RATIO else "above"
    return (
        f"{_short(loss)} is {ratio:.2g} of the task loss, {side} {bound:g}; {verb} {_weight(loss)}."
    )


def cosine_warning(loss: str, cosine: float) -> str | None:
    """A sentence if a distillation loss pulls the student away from its task, or None.

    Args:
        loss: as in :func:`ratio_warning`.
        cosine: of the gradients of that loss and of the task loss in the student, in [-1, 1].
    """
    if not cosine < LOWEST_COSINE:
        return None
    return (
        f"{_short(loss)} has a gradient against that of the task loss (cosine {cosine:.2f}, below "
        f"{LOWEST_COSINE:g}); lower {_weight(loss)} or compare other levels."
    )


def dead_warning(loss: str, what: str) -> str:
    """A sentence about a loss that teaches the student nothing.

    Args:
        loss: as in :func:`ratio_warning`.
        what: is exactly 0: "loss" or "gradient".
    """
    return (
        f"{_short(loss)} is dead: its {what} is exactly 0, although {_weight(loss)} is not; look "
        "at what it compares (the teacher's weights, the levels, frozen layers)."
    )


def _short(loss: str) -> str:
    return loss.removeprefix("loss_")


def _weight(loss: str) -> str:
    return f"MODEL.DISTILL.{_short(loss).split('/')[0].upper()}.WEIGHT"
