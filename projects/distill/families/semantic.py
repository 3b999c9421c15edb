"""Semantic segmentation: backbone, then a head whose last convolution is ``predictor``."""

from collections.abc import Collection
from typing import Any

from detectron2.modeling.meta_arch import SemanticSegmentor
from detectron2.projects.deeplab import DeepLabV3Head
from torch import Tensor, nn

from ..structures import Batch, NetworkOutputs, SemSeg
from .base import Family
from .recorder import Recorder, record

PREDICTOR = "sem_seg_head.predictor"


def sem_seg_modules(needs: Collection[str]) -> list[str]:
    """Return the modules to record for the semantic head."""
    return [PREDICTOR] if "sem_seg" in needs else []


def read_sem_seg(outputs: NetworkOutputs, recorder: Recorder, needs: Collection[str]) -> None:
    """Fill ``sem_seg`` if it is needed; in training, the head itself returns losses."""
    if "sem_seg" in needs:
        call = recorder[PREDICTOR]
        outputs.sem_seg = SemSeg(call.args[0], call.output)


def ask_sem_seg(model: nn.Module, outputs: NetworkOutputs, needs: Collection[str]) -> None:
    """Fill ``sem_seg`` if it is needed, by running the head up to its predictor."""
    if "sem_seg" in needs:
        with record(model, [PREDICTOR]) as recorder:
            _predict(model.sem_seg_head, outputs.features)
        read_sem_seg(outputs, recorder, needs)


def _predict(head: Any, features: dict[str, Tensor]) -> None:
    """Run a semantic head up to its predictor; later layers enlarge the logits to the image."""
    if hasattr(head, "layers"):
        head.layers(features)
    elif isinstance(head, DeepLabV3Head):
        head.predictor(head.aspp(features[head.in_features[0]]))
    else:
        head(features)


class SemanticFamily(Family):
    """Semantic segmenters."""

    architecture = SemanticSegmentor

    @property
    def outputs(self) -> frozenset[str]:
        return super().outputs | {"sem_seg"}

    @property
    def num_classes(self) -> int:
        return self.model.sem_seg_head.predictor.out_channels

    def recorded_modules(self, needs: Collection[str]) -> list[str]:
        return super().recorded_modules(needs) + sem_seg_modules(needs)

    def read(self, recorder: Recorder, batch: Batch, needs: Collection[str]) -> NetworkOutputs:
        outputs = super().read(recorder, batch, needs)
        read_sem_seg(outputs, recorder, needs)
        return outputs

    def answer(
        self,
        images: Tensor,
        student: NetworkOutputs,
        outputs: NetworkOutputs,
        needs: Collection[str],
    ) -> None:
        ask_sem_seg(self.model, outputs, needs)
