"""What happens beside the training step."""

import logging
import math
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventStorage, get_event_storage

from ..checkpoint.save import StudentCheckpointer
from ..heads import DistillHead
from .health import cosine_warning, dead_warning, ratio_warning
from .telemetry import head_of

logger = logging.getLogger(__name__)


class KDRatioHook(HookBase):
    """Logs each distillation loss over the task loss, per head and level, from iteration 0."""

    def __init__(self, heads: Sequence[str]):
        self.heads = heads

    def after_step(self) -> None:
        storage = get_event_storage()
        losses = {k: v for k, v in put_now(storage).items() if k.startswith("loss")}
        distilled = {k: v for k, v in losses.items() if head_of(k, self.heads)}
        task = sum(losses.values()) - sum(distilled.values())
        ratios = {f"kd_ratio/{k[5:]}": v / max(task, 1e-12) for k, v in distilled.items()}
        storage.put_scalars(**ratios, smoothing_hint=True)


class EvalHook(hooks.EvalHook):
    """detectron2's, but the last one comes in the last iteration, before the final checkpoint.

    So a run that is killed after its final checkpoint lacks nothing.

    Args:
        period: iterations between two evaluations; 0: at the end alone.
        evaluate: returns the metrics.
        weights_in_place: the context of an evaluation.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], Any],
        weights_in_place: Callable[[], AbstractContextManager[None]],
    ):
        super().__init__(period, evaluate)
        self.weights_in_place = weights_in_place

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self._period and done % self._period == 0):
            with self.weights_in_place():
                self._do_eval()

    def after_train(self) -> None:
        del self._func, self.weights_in_place  # they refer to the trainer


class CheckpointHook(HookBase):
    """Saves every ``period`` iterations and at the end, and keeps the newest ``keep``.

    Args:
        checkpointer: does nothing but in the main process.
        period: iterations.
        keep: periodic checkpoints; 0: all.
    """

    def __init__(self, checkpointer: StudentCheckpointer, period: int, keep: int):
        self.checkpointer = checkpointer
        self.period = period
        self.keep = keep

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 and done < self.trainer.max_iter:
            self._save(f"model_{self.trainer.iter:07d}")
        elif done == self.trainer.max_iter:
            self._save("model_final")

    def _save(self, name: str) -> None:
        self.checkpointer.save(name, iteration=self.trainer.iter)
        if self.keep and self.checkpointer.save_to_disk:
            self.checkpointer.prune(self.keep)


class BestCheckpointHook(HookBase):
    """Keeps the student of the best evaluation so far in ``model_best.pth``; higher is better.

    Its value is part of the training state: a resumed run chooses as an uninterrupted one does.
    The file is no place to resume from.

    Args:
        checkpointer: does nothing but in the main process.
        period: iterations between two evaluations; 0: at the end alone.
        metric: such as "bbox/AP", as the evaluation logs it.
    """

    def __init__(self, checkpointer: StudentCheckpointer, period: int, metric: str):
        self.checkpointer = checkpointer
        self.period = period
        self.metric = metric
        self.best: float | None = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self.period and done % self.period == 0):
            self._compare()

    def _compare(self) -> None:
        if not self.checkpointer.save_to_disk:
            return
        value = put_now(get_event_storage()).get(self.metric)
        if value is None:
            logger.warning("TEST.BEST_METRIC %s is not among the evaluation's metrics", self.metric)
        elif not math.isnan(value) and (self.best is None or value > self.best):
            self.best = value
            logger.info("Best %s so far: %.4f", self.metric, value)
            self.checkpointer.save_best(self.trainer.iter, self.metric, value)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else {"metric": self.metric, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state.get("best") if state.get("metric") == self.metric else None


class TelemetryHook(HookBase):
    """Logs images a second, the share of time spent waiting for data, memory, pictures left out.

    Args:
        batch_size: pictures of an iteration over all processes.
        left_out: number of pictures that could not be used so far.
    """

    def __init__(self, batch_size: int, left_out: Callable[[], int]):
        self.batch_size = batch_size
        self.left_out = left_out

    def after_step(self) -> None:
        storage = get_event_storage()
        now = put_now(storage)
        speeds = {}
        if now.get("time"):  # detectron2 measures from the third iteration on
            speeds["images_per_second"] = self.batch_size / now["time"]
            if "data_time" in now:
                speeds["data_share"] = min(now["data_time"] / now["time"], 1.0)
        storage.put_scalars(**speeds, smoothing_hint=True)
        counts = {"memory_mb": memory_mb(), "data/left_out": self.left_out()}
        storage.put_scalars(**counts, smoothing_hint=False)


class LossHealthHook(HookBase):
    """Warns once about each thing in the log that a person should look at.

    A level on which a head finds nothing to compare is none: the sum over its levels is judged.

    Args:
        heads: the distillation heads, of which those at their full weight are judged.
        period: iterations between two looks, which judge what was typical in between.
        data_share: share of the time spent waiting for data from which on it is too much.
    """

    def __init__(self, heads: Mapping[str, DistillHead], period: int = 20, data_share: float = 0.5):
        self.heads = {name.lower(): head for name, head in heads.items()}
        self.period = period
        self.data_share = data_share
        self.raised: set[str] = set()

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            for name, sentence in self.alarms(get_event_storage()):
                if name not in self.raised:
                    self.raised.add(name)
                    logger.warning("Iteration %d: %s", self.trainer.iter, sentence)

    def alarms(self, storage: EventStorage) -> list[tuple[str, str]]:
        """Names and sentences of what is out of bounds now."""
        found: list[tuple[str, str | None]] = []
        for head, module in self.heads.items():
            if module.factor() == module.weight != 0:
                found += self._of_head(head, module, storage)
        share = typical(self._last(storage, "data_share"))
        if share > self.data_share:
            text = f"{share:.0%} of the time is spent waiting for data; "
            found.append(("data_share", f"{text}raise DATALOADER.NUM_WORKERS."))
        return [(name, sentence) for name, sentence in found if sentence]

    def _of_head(
        self, head: str, module: DistillHead, storage: EventStorage
    ) -> Iterator[tuple[str, str | None]]:
        names = [x for x in storage.histories() if x.split("/")[:2] == ["kd_ratio", head]]
        parts = [self._last(storage, name, module.warmup_iters) for name in names]
        if any(parts):
            ratio = sum(map(typical, parts))
            sentence = ratio_warning(head, ratio) if ratio else dead_warning(head, "loss")
            yield f"kd_ratio/{head}", sentence
        cosine = typical(self._last(storage, f"kd_cosine/{head}", module.warmup_iters))
        yield f"kd_cosine/{head}", cosine_warning(head, cosine)

    def _last(self, storage: EventStorage, name: str, since: int = 0) -> list[float]:
        """The last values from iteration ``since`` on."""
        history = storage.histories().get(name)
        last = history.values()[-self.period :] if history else []
        return [value for value, iteration in last if iteration >= since]


def typical(values: Sequence[float]) -> float:
    """Median of the values that are not 0; without any, 0."""
    present = [x for x in values if x != 0]
    return median(present) if present else 0.0


def put_now(storage: EventStorage) -> dict[str, float]:
    """The scalars of this iteration; ``latest()`` has older ones too, after a skipped step say."""
    return {name: v for name, (v, i) in storage.latest().items() if i == storage.iter}


def memory_mb() -> float:
    """Peak memory of this process in MiB: of its GPU if it uses one, otherwise resident."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
