"""Distillation of detectron2 detectors and segmenters.

The package registers its meta-architectures, networks, heads and data sets with detectron2. It does
so when it is imported after detectron2, otherwise when one of its public names is used first. Until
then, ``import distill`` loads neither torch nor detectron2, so that the command line is quick.
"""

# ruff: noqa: F405

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# detectron2's anchor generator calls torch.meshgrid without ``indexing``. Python's -W still wins.
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", append=True)

__all__ = [
    "DISTILL_HEAD_REGISTRY",
    "DenseDistillHead",
    "DistillHead",
    "DistillModel",
    "DistillRCNN",
    "DistillRetinaNet",
    "DistillSemanticSegmentor",
    "FPNDistillHead",
    "InstanceMaskDistillHead",
    "Key",
    "Presets",
    "ROIDistillHead",
    "RelationDistillHead",
    "Section",
    "SemSegDistillHead",
    "add_distill_config",
    "get_distill_cfg",
    "get_student_cfg",
    "validate_config",
]

if TYPE_CHECKING:
    from .api import *  # noqa: F403
elif "detectron2" in sys.modules:
    import_module(".api", __name__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".api", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
