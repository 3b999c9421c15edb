"""Mapper of ``INPUT.AUGMENT.STEPS``, instead of detectron2's with its resizing, crop and flip."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable

from ...structures import DETECTIONS
from ...utils.seeding import derived_seed
from ..detections import with_added
from ..guarded_mapper import BadImage, GuardedMapper
from ..stream import Surroundings
from .image import ImageReader, LabelledImage, Partners, fit, pad
from .labels import Size
from .steps import Pipeline, build_pipeline
from .transforms import resize

STRIDE = 32  # unit of INPUT.MULTI_SCALE.RANGE in pixels


class MultiScale(NamedTuple):
    """One random size for all images of an iteration, as in YOLOX.

    Attributes:
        period: iterations that have the same size.
        low, high: range of the height, in units of 32 pixels, both inclusive.
    """

    period: int
    low: int
    high: int

    def size(self, seed: int, iteration: int, base: Size) -> Size:
        """Return height and width, a function of the run's seed and the iteration.

        Args:
            base: height and width of the images, whose aspect ratio is kept.
        """
        draw = derived_seed(seed, iteration // self.period)
        height = self.low + draw % (self.high - self.low + 1)
        return STRIDE * height, STRIDE * max(round(height * base[1] / base[0]), 1)


class AugmentingMapper:
    """Mapper whose samples may have partners: images at the positions before them.

    A sample is a function of the run's seed, its position and the images before it. The cache only
    saves decoding, so that neither workers nor interruptions change a sample.

    Pipelines that combine images begin with images that fit into ``size``, as YOLO loads them. They
    are small enough to keep. Other pipelines begin with the image as it is in its file.

    Args:
        steps: the pipeline.
        last_steps: the pipeline from iteration ``switch_iter`` on; that is never if it is 0.
        switch_iter: iteration, counted from the start of the training.
        size: height and width of the images, before ``multi_scale``.
        fill: value of padding.
        multi_scale: sizes of the batches; None: all have ``size``.
        read: reader of images.
        cache: number of images that each process keeps.
        added_score: least score of a teacher's detections that become objects; 0: none do.
    """

    @configurable
    def __init__(
        self,
        *,
        steps: Pipeline,
        last_steps: Pipeline,
        switch_iter: int,
        size: Size,
        fill: int,
        multi_scale: MultiScale | None,
        read: ImageReader,
        cache: int,
        added_score: float = 0.0,
    ):
        self.steps, self.last_steps, self.switch_iter = steps, last_steps, switch_iter
        self.size, self.fill, self.multi_scale = size, fill, multi_scale
        self.read, self.guarded_read = read, GuardedMapper(read)
        self.use_instance_mask = read.use_instance_mask
        self.instance_mask_format = read.instance_mask_format
        self.cache = ImageCache(cache)
        self.added_score = added_score

    @classmethod
    def from_config(cls, cfg: CfgNode, ignored_regions: bool) -> dict[str, Any]:
        """Return the arguments of a config.

        Args:
            ignored_regions: paint over regions to ignore with the mean color.
        """
        node, scales = cfg.INPUT.AUGMENT, cfg.INPUT.MULTI_SCALE
        mean = [round(x) for x in cfg.MODEL.PIXEL_MEAN]
        return {
            "steps": build_pipeline(cfg, node.STEPS),
            "last_steps": build_pipeline(cfg, node.LAST_STEPS),
            "switch_iter": node.SWITCH_ITER,
            "size": (node.SIZE[0], node.SIZE[1]),
            "fill": node.FILL,
            "multi_scale": MultiScale(scales.PERIOD, *scales.RANGE) if scales.PERIOD else None,
            "read": ImageReader(
                image_format=cfg.INPUT.FORMAT,
                use_instance_mask=cfg.MODEL.MASK_ON,
                instance_mask_format=cfg.INPUT.MASK_FORMAT,
                ignored_color=mean if ignored_regions else None,
            ),
            "cache": node.CACHE,
            "added_score": cfg.MODEL.DISTILL.TEACHER.ADD_BOXES,
        }

    def __call__(
        self, entry: dict[str, Any], surroundings: Surroundings
    ) -> dict[str, Any] | BadImage:
        """Return an entry of ``batched_inputs``.

        Args:
            entry: detectron2's dataset dict of the sample.
            surroundings: position of the sample, and the images before it.
        """
        sample, dicts, seed = surroundings
        last = 0 < self.switch_iter <= sample.iteration
        steps = self.last_steps if last else self.steps

        def fitted(index: int) -> LabelledImage | BadImage:
            return self.cache.get(index, lambda: self._read_fitted(dicts[index]))

        image = fitted(sample.image) if steps.combines else self.read(entry)
        if isinstance(image, BadImage):
            return image
        image = pad(steps(image, Partners(fitted, sample.recent)), self.size, self.fill)
        if self.multi_scale:
            size = self.multi_scale.size(seed, sample.iteration, self.size)
            image = image.moved(resize(image.size, size), size)
        others = {k: v for k, v in entry.items() if k != "annotations"}
        pixels = torch.from_numpy(np.array(image.pixels.transpose(2, 0, 1), order="C"))
        instances = image.labels.instances(image.size, self.instance_mask_format)
        if DETECTIONS in entry:
            found = others[DETECTIONS] = image.labels.detections.instances(image.size)
            if self.added_score:
                instances = with_added(instances, found, self.added_score)
        return {**others, "image": pixels, "instances": instances}

    def _read_fitted(self, entry: dict[str, Any]) -> LabelledImage | BadImage:
        image = self.guarded_read(entry)
        return image if isinstance(image, BadImage) else fit(image, self.size)


class ImageCache:
    """Images by their index in the data set, of which the least recently used leave first.

    Args:
        number: images to keep.
    """

    def __init__(self, number: int):
        self.number = number
        self.images: OrderedDict[int, LabelledImage | BadImage] = OrderedDict()

    def get(
        self, index: int, make: Callable[[], LabelledImage | BadImage]
    ) -> LabelledImage | BadImage:
        """Return an image, which is made if it is not kept."""
        image = self.images.pop(index, None)
        if image is None:
            image = make()
        self.images[index] = image
        while len(self.images) > self.number:
            self.images.popitem(last=False)
        return image
