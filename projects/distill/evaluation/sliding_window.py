"""Semantic segmentation of large pictures by windows of the size that the network trained on."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor, nn

Size = tuple[int, int]  # height, width


class SlidingWindow(nn.Module):
    """Runs a semantic segmenter on overlapping windows and averages their logits.

    Windows start at multiples of the stride; the last of a row or column ends with the picture. Of
    a picture, memory holds the logits (K, H, W) once, and those of one window.

    Args:
        model: detectron2's ``SemanticSegmentor``, or what has its contract, in evaluation.
        crop_size: of a window, in pixels of the network's input. A larger one than the picture is
            the picture: then this is ``model`` itself.
        stride: between windows, in pixels, at most ``crop_size``.
    """

    def __init__(self, model: nn.Module, crop_size: Size, stride: Size):
        super().__init__()
        self.model = model
        self.crop_size = crop_size
        self.stride = stride
        self.train(model.training)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """The contract of detectron2's ``SemanticSegmentor`` in evaluation."""
        return [{"sem_seg": self._segment(x)} for x in batched_inputs]

    def _segment(self, picture: dict[str, Any]) -> Tensor:
        image = picture["image"]
        height, width = image.shape[1:]
        total, count = torch.empty(0), torch.zeros(0)
        for top in starts(height, self.crop_size[0], self.stride[0]):
            rows = slice(top, top + self.crop_size[0])
            for left in starts(width, self.crop_size[1], self.stride[1]):
                columns = slice(left, left + self.crop_size[1])
                (output,) = self.model([{"image": image[:, rows, columns]}])
                logits = output["sem_seg"]
                if not len(total):
                    total = logits.new_zeros((len(logits), height, width), dtype=torch.float32)
                    count = total.new_zeros((height, width))
                total[:, rows, columns] += logits
                count[rows, columns] += 1
        size = picture.get("height", height), picture.get("width", width)
        return sem_seg_postprocess(total.div_(count), (height, width), *size)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start so that they cover a side."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def with_sliding_window(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The network as ``TEST.SLIDING_WINDOW`` wants it evaluated; stock configs have no such key."""
    node = cfg.TEST.get("SLIDING_WINDOW")
    if node is None or not node.ENABLED:
        return model
    return SlidingWindow(model, tuple(node.CROP_SIZE), tuple(node.STRIDE))
