"""The student's meta-architecture, which ``Distill*`` architectures wrap."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY


def distill_architectures() -> list[str]:
    """Return the registered meta-architectures that hold a student (``DistillRCNN``, ...)."""
    return [name for name, cls in META_ARCH_REGISTRY if hasattr(cls, "student_architecture")]


def student_architecture(cfg: CfgNode) -> str:
    """Return the name of the student's plain meta-architecture.

    It is ``MODEL.META_ARCHITECTURE``, unless that is a ``Distill*`` one. The student of such a one
    is ``MODEL.DISTILL.STUDENT_ARCHITECTURE``; if that is empty, the default of the class.
    """
    name: str = cfg.MODEL.META_ARCHITECTURE
    if name not in distill_architectures():
        return name
    default: str = META_ARCH_REGISTRY.get(name).student_architecture
    return cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE or default


def student_class(cfg: CfgNode) -> type:
    """Return the class of the student's meta-architecture; ``object`` if a function builds it."""
    name = student_architecture(cfg)
    found = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return found if isinstance(found, type) else object
