"""Hooks of the trainer: evaluation, checkpoints, logs and warnings."""

import logging
import math
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import mean, median
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

from ..checkpoint.save import STUDENT, StudentCheckpointer
from ..heads import DistillHead
from ..heads.base import head_of
from ..modeling.balance import GradientBalance
from ..modeling.quantization import Quantization
from ..utils.old_names import HOOKS, with_renamed_keys
from .health import balance_warning, cosine_warning, dead_warning, ratio_warning
from .telemetry import RowWriter

logger = logging.getLogger(__name__)


class KDRatioHook(HookBase):
    """Log the ratio of each distillation loss to the task loss, per head and level.

    The log begins at iteration 0.
    """

    def __init__(self, heads: Sequence[str]):
        self.heads = heads

    def after_step(self) -> None:
        storage = get_event_storage()
        losses = {k: v for k, v in current_scalars(storage).items() if k.startswith("loss")}
        distilled = {k: v for k, v in losses.items() if head_of(k, self.heads)}
        task = sum(losses.values()) - sum(distilled.values())
        ratios = {f"kd_ratio/{k[5:]}": v / max(task, 1e-12) for k, v in distilled.items()}
        storage.put_scalars(**ratios, smoothing_hint=True)


class EvalHook(hooks.EvalHook):
    """detectron2's ``EvalHook``, with the last evaluation in the last iteration, not after it.

    So the hooks that follow know its results.

    Args:
        period: iterations between two evaluations; 0: only at the end.
        evaluate: function that returns the metrics.
        weights_in_place: context in which the student has the weights to evaluate.
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
        del self._func, self.weights_in_place  # both refer to the trainer


class QuantizationHook(HookBase):
    """Hook that moves the ranges of the quantized tensors after each step."""

    def __init__(self, quantization: Quantization):
        self.quantization = quantization

    def after_step(self) -> None:
        was_active = self.quantization.active
        self.quantization.update()
        if self.quantization.active and not was_active:
            logger.info(
                "Iteration %d: %d layers of the student are quantized from the next one on",
                *(self.trainer.iter, len(self.quantization.layers)),
            )


class CheckpointHook(HookBase):
    """Save every ``period`` iterations, and keep the newest ``keep`` checkpoints.

    Args:
        checkpointer: writes in the main process only.
        period: iterations between two checkpoints.
        keep: number of periodic checkpoints to keep; 0: all.
    """

    def __init__(self, checkpointer: StudentCheckpointer, period: int, keep: int):
        self.checkpointer = checkpointer
        self.period = period
        self.keep = keep

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 and done < self.trainer.max_iter:
            self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
            self.prune()

    def prune(self) -> None:
        if self.keep and self.checkpointer.save_to_disk:
            self.checkpointer.prune(self.keep)


class FinalCheckpointHook(HookBase):
    """Save ``model_final.pth`` in the last iteration, after its row of ``metrics.json``.

    Before the last evaluation, so that an evaluation that fails loses nothing of the training. And
    a second time after it if hooks keep its results.

    Args:
        periodic: hook of the other checkpoints.
        writers: hooks of the logs; empty except in the main process.
    """

    def __init__(self, periodic: CheckpointHook, writers: Sequence[PeriodicWriter]):
        self.periodic = periodic
        self.writers = writers

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.trainer.max_iter:
            for writer in (x for hook in self.writers for x in hook._writers):
                if isinstance(writer, RowWriter):
                    writer.write()
            self.periodic.checkpointer.save("model_final", iteration=self.trainer.iter)
            self.periodic.prune()


class BestCheckpointHook(HookBase):
    """Save the student with the highest metric so far as ``model_best.pth``.

    If ``patience`` evaluations in a row are not better, this iteration becomes the last one of the
    training. The hooks after this one then do what they do at the end.

    The best value is part of the training state, so a resumed run saves the same student as an
    uninterrupted one. It ends at the same iteration, too. A run cannot resume from
    ``model_best.pth``.

    Args:
        checkpointer: writes in the main process only.
        period: iterations between two evaluations; 0: only at the end.
        metric: name in the evaluation's log, such as "bbox/AP".
        patience: number of evaluations that are not better; 0: never end early.
    """

    def __init__(
        self, checkpointer: StudentCheckpointer, period: int, metric: str, patience: int = 0
    ):
        self.checkpointer = checkpointer
        self.period = period
        self.metric = metric
        self.patience = patience
        self.best: float | None = None
        self.best_iteration: int | None = None
        self.counted: int | None = None  # iteration of the last evaluation that was compared
        self.waited = 0  # evaluations since the best one

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self.period and done % self.period == 0):
            self._compare()
            # Only the main process has metrics.
            if self.patience and comm.all_gather(self.waited)[0] >= self.patience:
                self._log_end(done)
                self.trainer.max_iter = done

    @staticmethod
    def ran_out(state: dict[str, Any], patience: int, metric: str) -> bool:
        """Return whether the patience ended a training whose checkpoint has this state."""
        return 0 < patience <= state.get("waited", 0) and state["metric"] == metric

    def _log_end(self, done: int) -> None:
        if done == self.trainer.max_iter or not self.checkpointer.save_to_disk:
            return
        best = "there was no value" if self.best is None else f"the best is {self.best:.4f}"
        if self.best_iteration is not None:  # unknown if SOLVER.PATIENCE was set at a resume
            best = f"{best} of iteration {self.best_iteration}"
        logger.info(
            "Iteration %d: the training ends, as %d evaluations had no better %s; %s",
            *(self.trainer.iter, self.waited, self.metric, best),
        )

    def _compare(self) -> None:
        if not self.checkpointer.save_to_disk:
            return
        metrics = current_scalars(get_event_storage())
        value = metrics.get(self.metric)
        if value is None:
            self.waited += 1
            logger.warning("TEST.BEST_METRIC %s is not a metric of the evaluation", self.metric)
        elif self._count(value, self.trainer.iter):
            logger.info("Best %s so far: %.4f", self.metric, value)
            self.checkpointer.save_best(self.trainer.iter, self.metric, value)

    def _count(self, value: float, iteration: int) -> bool:
        """Count the value of an evaluation, and return whether it is the best so far."""
        self.waited, self.counted = self.waited + 1, iteration
        if math.isnan(value) or not (self.best is None or value > self.best):
            return False
        self.best, self.best_iteration, self.waited = value, iteration, 0
        return True

    def complete(
        self, checkpoint: dict[str, Any], metrics: Mapping[str, float]
    ) -> dict[str, Any] | None:
        """Count the last evaluation of a training, whose final checkpoint lacks it.

        Args:
            checkpoint: content of the final checkpoint, which is changed in place.
            metrics: results of the evaluation.

        Returns:
            The content of the new ``model_best.pth``, or None if the results are not the best.
        """
        trainer = checkpoint.setdefault("trainer", {})
        hooks = with_renamed_keys(trainer.get("hooks", {}), HOOKS, "The checkpoint")
        self.load_state_dict(hooks.get(type(self).__name__, {}))
        value, iteration = metrics.get(self.metric), checkpoint["iteration"]
        if value is None or self.counted == iteration:
            return None
        is_best = self._count(value, iteration)
        trainer["hooks"] = {**hooks, type(self).__name__: self.state_dict()}
        if not is_best:
            return None
        kept = {key: checkpoint[key] for key in (*STUDENT, "iteration") if key in checkpoint}
        return {**kept, self.metric: value}

    def state_dict(self) -> dict[str, Any]:
        counted = {
            "best_iteration": self.best_iteration,
            "waited": self.waited,
            "counted": self.counted,
        }
        if self.best is None and not (self.patience and self.waited):
            return {}
        return {"metric": self.metric, "best": self.best, **(counted if self.patience else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = state if state.get("metric") == self.metric else {}
        self.best, self.best_iteration = state.get("best"), state.get("best_iteration")
        self.waited, self.counted = state.get("waited", 0), state.get("counted")


class TelemetryHook(HookBase):
    """Log images per second, the share of time spent waiting for data, memory and dropped images.

    Args:
        batch_size: images per iteration over all processes.
        left_out: function that returns the number of images dropped so far.
    """

    def __init__(self, batch_size: int, left_out: Callable[[], int]):
        self.batch_size = batch_size
        self.left_out = left_out

    def after_step(self) -> None:
        storage = get_event_storage()
        scalars = current_scalars(storage)
        speeds = {}
        if scalars.get("time"):  # which detectron2 logs from the third iteration on
            speeds["images_per_second"] = self.batch_size / scalars["time"]
            if "data_time" in scalars:
                speeds["data_share"] = min(scalars["data_time"] / scalars["time"], 1.0)
        storage.put_scalars(**speeds, smoothing_hint=True)
        counts = {"memory_mb": memory_mb(), "data/left_out": self.left_out()}
        storage.put_scalars(**counts, smoothing_hint=False)


class LossHealthHook(HookBase):
    """Warn once about each loss, gradient and loading time that is out of bounds.

    The losses of a head are judged by their sum over the levels, because a single level may have
    nothing to compare.

    Args:
        heads: distillation heads by name; only heads at their full weight are judged.
        balance: sets the weights of the heads, if they set themselves.
        period: iterations between two checks. A check uses medians over the period.
        data_share: largest share of the time that may be spent waiting for data.
    """

    def __init__(
        self,
        heads: Mapping[str, DistillHead],
        balance: GradientBalance | None = None,
        period: int = 20,
        data_share: float = 0.5,
    ):
        self.heads = heads
        self.balance = balance
        self.period = period
        self.data_share = data_share
        self.warned: set[str] = set()

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            for name, sentence in self.warnings(get_event_storage()):
                if name not in self.warned:
                    self.warned.add(name)
                    logger.warning("Iteration %d: %s", self.trainer.iter, sentence)

    def warnings(self, storage: EventStorage) -> list[tuple[str, str]]:
        """Return the names of the scalars that are out of bounds now, each with a sentence."""
        found: list[tuple[str, str | None]] = []
        for head, module in self.heads.items():
            if module.factor() == module.weight != 0:
                found += self._head_warnings(head, module, storage)
        share = median_of_nonzero(self._last(storage, "data_share"))
        if share > self.data_share:
            text = f"{share:.0%} of the time is spent waiting for data; "
            found.append(("data_share", f"{text}raise DATALOADER.NUM_WORKERS."))
        return [(name, sentence) for name, sentence in found if sentence]

    def _head_warnings(
        self, name: str, module: DistillHead, storage: EventStorage
    ) -> Iterator[tuple[str, str | None]]:
        head = name.lower()
        names = [x for x in storage.histories() if x.split("/")[:2] == ["kd_ratio", head]]
        parts = [self._last(storage, name, module.warmup_iters) for name in names]
        ratios = [median_of_nonzero(x) for x in parts if x]
        if ratios:
            yield f"kd_ratio/{head}", self._ratio_warning(name, ratios)
        cosines = self._last(storage, f"kd_cosine/{head}", module.warmup_iters)
        yield f"kd_cosine/{head}", cosine_warning(head, median_of_nonzero(cosines))

    def _ratio_warning(self, name: str, ratios: Sequence[float]) -> str | None:
        head = name.lower()
        if not any(ratios):
            return dead_warning(head, "gradient" if self.balance else "loss")
        if self.balance:
            return balance_warning(head, mean(ratios), self.balance.share(name))
        return ratio_warning(head, sum(ratios))

    def _last(self, storage: EventStorage, name: str, since: int = 0) -> list[float]:
        """Return the values of the last period, without those before iteration ``since``."""
        history = storage.histories().get(name)
        last = history.values()[-self.period :] if history else []
        return [value for value, iteration in last if iteration >= since]


def median_of_nonzero(values: Sequence[float]) -> float:
    """Return the median of the values that are not 0, or 0 if all are 0."""
    present = [x for x in values if x != 0]
    return median(present) if present else 0.0


def current_scalars(storage: EventStorage) -> dict[str, float]:
    """Return the scalars of this iteration; ``latest()`` may have older ones, of skipped steps."""
    return {name: v for name, (v, i) in storage.latest().items() if i == storage.iter}


def memory_mb() -> float:
    """Return the peak memory of this process in MiB: on its GPU, or resident without a GPU."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
