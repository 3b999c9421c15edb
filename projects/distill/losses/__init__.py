"""The mathematics of distillation: pure functions of tensors, one method a file."""

from .dense import dense_kd
from .fitnet import fitnet
from .frequency import frequency_mask, frequency_masked_mse
from .ima import ima
from .kd import binary_kl, categorical_kl, kd

__all__ = [
    "binary_kl",
    "categorical_kl",
    "dense_kd",
    "fitnet",
    "frequency_mask",
    "frequency_masked_mse",
    "ima",
    "kd",
]
