"""Bounds of a healthy distillation, and the warnings beyond them.

The doctor applies them to two batches, :class:`LossHealthHook` to the last iterations.
"""

# Bounds of distillation loss over task loss. A head with a smaller ratio has almost no effect; a
# head with a larger one dominates the training.
LOWEST_RATIO = 0.001
HIGHEST_RATIO = 10.0
BALANCED = 10.0  # bound of a balanced gradient over its share, and of the share over the gradient
LOWEST_COSINE = -0.5  # between the gradients of distillation and task


def ratio_warning(loss: str, ratio: float) -> str | None:
    """Return a warning if a distillation loss is too small or too large for the task loss, or None.

    Args:
        loss: name of the loss of a head with a weight, such as ``fitnet`` or ``loss_fitnet/p2``.
        ratio: distillation loss over task loss. If it is not finite, other checks report it.
    """
    if LOWEST_RATIO <= ratio <= HIGHEST_RATIO or not abs(ratio) < float("inf"):
        return None
    bound, verb = (LOWEST_RATIO, "raise") if ratio < LOWEST_RATIO else (HIGHEST_RATIO, "lower")
    side = "below" if ratio < LOWEST_RATIO else "above"
    return (
        f"{_short(loss)} is {ratio:.2g} of the task loss, {side} {bound:g}; {verb} {_weight(loss)}."
    )


def balance_warning(head: str, ratio: float, share: float) -> str | None:
    """Return a warning if the balance does not keep a head's gradient near its share, or None.

    Args:
        head: name of the head.
        ratio: norm of the head's gradient over that of the task.
        share: the ratio that ``MODEL.DISTILL.BALANCE`` gives to the head.
    """
    if share / BALANCED <= ratio <= share * BALANCED:
        return None
    return (
        f"{head} has {ratio:.2g} of the task's gradient instead of {share:.2g}, because both "
        "change much from step to step; raise SOLVER.IMS_PER_BATCH or compare other levels."
    )


def cosine_warning(loss: str, cosine: float) -> str | None:
    """Return a warning if a distillation loss pulls the student away from its task, or None.

    Args:
        loss: name of the loss, as in :func:`ratio_warning`.
        cosine: cosine in [-1, 1] between the student's gradients of that loss and the task loss.
    """
    if not cosine < LOWEST_COSINE:
        return None
    return (
        f"{_short(loss)} has a gradient that opposes that of the task loss (cosine {cosine:.2f}, "
        f"below {LOWEST_COSINE:g}); lower {_weight(loss)} or compare other levels."
    )


def dead_warning(loss: str, what: str) -> str:
    """Return a warning about a loss from which the student learns nothing.

    Args:
        loss: name of the loss, as in :func:`ratio_warning`.
        what: the quantity that is exactly 0, "loss" or "gradient".
    """
    return (
        f"{_short(loss)} is dead: its {what} is exactly 0, although {_weight(loss)} is not; check "
        "the teacher's weights, the levels that are compared, and frozen layers."
    )


def _short(loss: str) -> str:
    return loss.removeprefix("loss_")


def _weight(loss: str) -> str:
    head, _, teacher = _short(loss).split("/")[0].partition("@")
    of_teacher = f" or FACTOR of the teacher {teacher}" if teacher else ""
    return f"MODEL.DISTILL.{head.upper()}.WEIGHT{of_teacher}"
