"""Semantic segmentation of large images by windows of the training size."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor, nn

Size = tuple[int, int]  # height, width


class SlidingWindow(nn.Module):
    """Run a semantic segmenter on overlapping windows and average the logits.

    Windows start at multiples of the stride. The last window of a row or column ends at the border
    of the image. The memory holds the logits of one image (K, H, W) once, and those of one window.

    Args:
        model: detectron2's ``SemanticSegmentor``, or a module with its contract, in evaluation.
        crop_size: height and width of a window in pixels of the network's input. If the image is
            not larger, the result is that of ``model`` itself.
        stride: distance between windows in pixels, at most ``crop_size``.
    """

    def __init__(self, model: nn.Module, crop_size: Size, stride: Size):
        super().__init__()
        self.model = model
        self.crop_size = crop_size
        self.stride = stride
        self.train(model.training)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Follow the contract of detectron2's ``SemanticSegmentor`` in evaluation."""
        return [{"sem_seg": self._segment(x)} for x in batched_inputs]

    def _segment(self, sample: dict[str, Any]) -> Tensor:
        """Return the (K, height, width) logits of one image in the size that its entry asks for."""
        image = sample["image"]
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
        size = sample.get("height", height), sample.get("width", width)
        return sem_seg_postprocess(total.div_(count), (height, width), *size)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return the positions at which windows start so that they cover a side."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def with_sliding_window(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Wrap the network in a :class:`SlidingWindow` if ``TEST.SLIDING_WINDOW`` is enabled.

    A stock config has no such key, and the network is returned unchanged.
    """
    node = cfg.TEST.get("SLIDING_WINDOW")
    if node is None or not node.ENABLED:
        return model
    return SlidingWindow(model, tuple(node.CROP_SIZE), tuple(node.STRIDE))
