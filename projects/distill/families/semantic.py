"""Semantic segmentation: backbone, then a head whose last convolution is ``predictor``."""

from collections.abc import Collection
from typing import Any

from detectron2.modeling.meta_arch import SemanticSegmentor
from detectron2.projects.deeplab import DeepLabV3Head
from torch import Tensor, nn

from ..structures import Batch, SemSeg, Signals
from .base import Probe
from .recorder import Calls, listen

PREDICTOR = "sem_seg_head.predictor"


def sem_seg_taps(needs: Collection[str]) -> list[str]:
    return [PREDICTOR] if "sem_seg" in needs else []


def read_sem_seg(signals: Signals, calls: Calls, needs: Collection[str]) -> None:
    """Fill ``signals.sem_seg`` if needed; the head itself returns losses in training."""
    if "sem_seg" in needs:
        call = calls[PREDICTOR]
        signals.sem_seg = SemSeg(call.args[0], call.output)


def ask_sem_seg(model: nn.Module, signals: Signals, needs: Collection[str]) -> None:
    """Fill ``signals.sem_seg`` if needed by running the head up to its predictor."""
    if "sem_seg" in needs:
        with listen(model, [PREDICTOR]) as calls:
            _predict(model.sem_seg_head, signals.features)
        read_sem_seg(signals, calls, needs)


def _predict(head: Any, features: dict[str, Tensor]) -> None:
    """Run a semantic head up to its predictor: what follows enlarges logits to the picture."""
    if hasattr(head, "layers"):
        head.layers(features)
    elif isinstance(head, DeepLabV3Head):
        head.predictor(head.aspp(features[head.in_features[0]]))
    else:
        head(features)


class SemanticProbe(Probe):
    family = SemanticSegmentor

    @property
    def signals(self) -> frozenset[str]:
        return super().signals | {"sem_seg"}

    @property
    def num_classes(self) -> int:
        return self.model.sem_seg_head.predictor.out_channels

    def taps(self, needs: Collection[str]) -> list[str]:
        return super().taps(needs) + sem_seg_taps(needs)

    def read(self, calls: Calls, batch: Batch, needs: Collection[str]) -> Signals:
        signals = super().read(calls, batch, needs)
        read_sem_seg(signals, calls, needs)
        return signals

    def ask(self, images: Tensor, student: Signals, needs: Collection[str]) -> Signals:
        signals = super().ask(images, student, needs)
        ask_sem_seg(self.model, signals, needs)
        return signals
