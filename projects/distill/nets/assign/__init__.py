"""Assignment of priors to ground-truth boxes in dense detectors, without loops over boxes."""

from .geometric import NO_BOX, atss_assign, nearest_point_assign

__all__ = ["NO_BOX", "atss_assign", "nearest_point_assign"]
