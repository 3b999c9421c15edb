"""Attention transfer (AT; Zagoruyko and Komodakis, "Paying more attention to attention")."""

from torch import Tensor

from .reduce import same_cells, unit


def at(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer: squared distance of the directions of two attention maps (Eq. 2).

    L = 1/N Σ_n ‖q_S/‖q_S‖ − q_T/‖q_T‖‖², q = Σ_c x² over the H·W cells of an image

    The paper's distance is an lp norm with p = 2; this is its square, which is smooth at 0. The
    channels of the maps may differ.

    Args:
        student: (N, C, H, W).
        teacher: (N, C', H, W); no gradient reaches it.

    Returns:
        A scalar in [0, 2] in float32; a connected zero for an empty batch. A map of zeros has no
        direction and no gradient.

    Raises:
        ValueError: if batches or sizes differ.
    """
    student, teacher = same_cells(student, teacher)
    directions = [unit(x.square().sum(1).flatten(1), 1) for x in (student, teacher.detach())]
    return (directions[0] - directions[1]).square().sum() / max(len(student), 1)
