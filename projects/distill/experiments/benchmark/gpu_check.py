"""One command for a GPU: precision, compilation, cache, host synchronisations, costs, memory.

Without a GPU it runs on the CPU, where no call waits for a GPU.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ...data.datasets import number_of_classes
from ...engine import setup_config
from ...engine.train_loop import forward_context
from ...modeling.feature_cache import FeatureCache
from ...utils.progress import Progress
from ...utils.timing import seconds, spread
from .memory import peak_mebibytes
from .networks import Networks, synthetic_batch
from .steps import measure_steps, step

CONFIG = "COCO-Detection/TID/faster_rcnn_R_101_FPN-faster_rcnn_R_50_FPN.yaml"
HEADS = ("FitNet", "PKD", "CWD", "FGD", "MKD", "IMA", "TID", "ROIKD", "DenseKD")
TEACHER = "MODEL.DISTILL.TEACHER"
# How the rows of "precision" differ from a plain float32 step: half precision of all, and keys.
VARIANTS: dict[str, tuple[bool, Sequence[Any]]] = {
    "float32": (False, ()),
    "half": (True, ()),
    "half, float32 teacher": (True, (f"{TEACHER}.DTYPE", "float32")),
    "bfloat16 teacher": (False, (f"{TEACHER}.DTYPE", "bfloat16")),
    "float16 teacher": (False, (f"{TEACHER}.DTYPE", "float16")),
    "channels-last teacher": (False, (f"{TEACHER}.CHANNELS_LAST", True)),
    "compiled teacher": (False, (f"{TEACHER}.COMPILE", True)),
    "half, compiled, channels last": (
        True,
        (f"{TEACHER}.COMPILE", True, f"{TEACHER}.CHANNELS_LAST", True),
    ),
}
Rows = dict[str, dict[str, Any]]


class GPUCheck:
    """The checks, on random images of a size.

    Args:
        opts: overrides of :data:`CONFIG`.
        size: (height, width) of the images in pixels.
        batch: images of a step.
        repeats: rounds of each measurement.
        progress: shows the checks.
    """

    def __init__(
        self,
        opts: Sequence[str],
        size: tuple[int, int],
        batch: int,
        repeats: int,
        progress: Progress,
    ):
        self.cuda = torch.cuda.is_available()
        device = "cuda" if self.cuda else "cpu"
        heads = ("MODEL.DISTILL.HEADS", repr(HEADS))
        self.opts = ["MODEL.DEVICE", device, *heads, *opts]
        self.device, self.repeats, self.progress = device, repeats, progress
        classes = number_of_classes(self.cfg())[1] or 1
        self.inputs = synthetic_batch(batch, *size, classes, 20, 0)

    def cfg(self, *opts: Any) -> CfgNode:
        return setup_config(CONFIG, [*self.opts, *map(str, opts)])

    def run(self) -> dict[str, Rows]:
        """Return the rows of all checks by their name."""
        with EventStorage():
            return {
                "precision": self.precision(),
                "synchronisations": self.synchronisations(),
                "cache": self.cached(),
                "steps": self.steps(),
            }

    def steps(self) -> Rows:
        """Return what :func:`measure_steps` does."""
        return measure_steps(Networks(self.cfg()), self.inputs, self.repeats, self.progress)

    def precision(self) -> Rows:
        """Return the seconds and MiB of a step by variant.

        ``difference`` is the largest relative difference of a loss from that of ``float32``, and
        ``finite`` is 1 if all losses are.
        """
        rows: Rows = {}
        exact: dict[str, Tensor] = {}
        for name, (half, opts) in self.progress.track(VARIANTS.items(), description="precision"):
            networks = Networks(self.cfg(*opts))
            model = networks.model(list(networks.heads))
            losses = self.losses(model, half)
            exact = exact or losses
            call = functools.partial(self.step, model, half)
            times = [seconds(call, self.cuda) for _ in range(self.repeats + 1)]
            model.zero_grad(set_to_none=True)
            differences = [(losses[k] - x).abs() / (x.abs() + 1e-6) for k, x in exact.items()]
            rows[name] = {
                "seconds": spread(times[1:]),
                "mib": peak_mebibytes(call, self.cuda),
                "difference": float(torch.stack(differences).max()),
                "finite": int(all(x.isfinite() for x in losses.values())),
            }
        return rows

    def synchronisations(self) -> Rows:
        """Return how often the host waits for the GPU in a step, by head and for the student.

        ``added`` is the number beyond that of the student's own step.
        """
        networks = Networks(self.cfg())
        plain = _waits(functools.partial(self.step, networks.student, False), self.cuda)
        rows: Rows = {"student": {"waits": plain, "added": 0}}
        for name in networks.heads:
            call = functools.partial(self.step, networks.model([name]), False)
            call()  # a first step moves the teacher and makes constants
            waits = _waits(call, self.cuda)
            rows[name] = {"waits": waits, "added": waits - plain}
        return rows

    def cached(self) -> Rows:
        """Return the seconds of a step without a cache, while it is written, and from it.

        ``equal`` is 1 if all losses have the same bits as without a cache.
        """
        networks = Networks(self.cfg("MODEL.DISTILL.HEADS", ("FitNet",)))
        model = networks.model(list(networks.heads))
        exact = self.losses(model, False)
        plain = seconds(functools.partial(self.step, model, False), self.cuda)
        rows: Rows = {"without": {"seconds": plain, "equal": 1}}
        (teacher,) = networks.teachers.values()
        with TemporaryDirectory() as folder:
            teacher.cache = FeatureCache(folder, "teacher", torch.float32, 1e11)
            for name in ("written", "read"):
                taken = seconds(functools.partial(self.step, model, False), self.cuda)
                losses = self.losses(model, False)
                equal = all(torch.equal(losses[k], x) for k, x in exact.items())
                rows[name] = {"seconds": taken, "equal": int(equal)}
        return rows

    def losses(self, model: nn.Module, half: bool) -> dict[str, Tensor]:
        """Return the losses of a forward whose random regions are the same in each."""
        torch.manual_seed(0)
        with forward_context(self.device, half):
            losses: dict[str, Tensor] = model(self.inputs)
        return {name: x.detach().float() for name, x in losses.items()}

    def step(self, model: nn.Module, half: bool) -> None:
        """Run a step whose random regions are the same in each."""
        torch.manual_seed(0)
        step(model, self.inputs, forward_context(self.device, half))


def _waits(function: Callable[[], Any], cuda: bool) -> int:
    """Return how many operations of a call wait for the GPU."""
    if not cuda:
        function()
        return 0
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(x.message) for x in found)
