"""Distillation heads: the outputs that are compared, and the adapters between them.

Importing the package imports all of its modules, so a new method needs no line here. Each
registered head is an attribute of the package: ``distill.heads.FGD``.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from .base import (
    DISTILL_HEAD_REGISTRY,
    DistillHead,
    build_heads,
    first_phases,
    short_trainings,
    teacher_needed,
    unfinished_phases,
)
from .dense import DenseDistillHead
from .fpn import FPNDistillHead
from .mask import InstanceMaskDistillHead
from .roi import ROIDistillHead
from .semantic import RelationDistillHead, SemSegDistillHead

__all__ = [
    "DISTILL_HEAD_REGISTRY",
    "DenseDistillHead",
    "DistillHead",
    "FPNDistillHead",
    "InstanceMaskDistillHead",
    "ROIDistillHead",
    "RelationDistillHead",
    "SemSegDistillHead",
    "build_heads",
    "first_phases",
    "short_trainings",
    "teacher_needed",
    "unfinished_phases",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Any:
    if name in DISTILL_HEAD_REGISTRY:
        return DISTILL_HEAD_REGISTRY.get(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
