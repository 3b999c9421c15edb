"""Repeat a training step that was not finite, and find the first module that made it so.

    distill replay OUTPUT_DIR/nonfinite/... [KEY VALUE ...]

A training writes such a step to OUTPUT_DIR/nonfinite, see SOLVER.ON_NONFINITE. The teacher's files
and the annotations must be where the run's config says.

The exit code is 0 if the step is not finite here either, 1 if it is finite, and 2 if the file
cannot be used.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..checkpoint.load import read_torch, readable
from ..checkpoint.save import StudentState
from ..engine.nonfinite import bad_gradients, from_plain, says_nonfinite
from ..engine.setup import be_deterministic, setup_config
from ..engine.train_loop import Piece, forward_context, mean_losses, pieces, seed_step
from ..errors import DistillError, WeightsError
from ..modeling.balance import balance_of
from ..modeling.meta_arch import DistillModel, build_distill_model
from ..modeling.quantization import PART, build_quantization
from ..modeling.unlabeled import unlabeled_of
from ..utils.old_names import HEADS, LOSSES, with_renamed_keys
from ..utils.text import one_line

_TYPES = {
    **{"what": str, "losses": dict, "config": str, "seed": int, "iteration": int, "rank": int},
    **{"model": dict, "student_state": dict, "batch": list},
}


@dataclass
class Replay:
    """Result of a repeated step.

    Attributes:
        what: message of the run.
        losses: losses of the repeated step by name.
        saved_losses: losses of the run by name.
        sources: weights, images, modules and losses that are not finite although their inputs are,
            in the order of the computation. If all of these are finite, the list has gradients
            that are not, in the order of the backward.
        error: message of detectron2's own check in the forward; None if it did not fail.
    """

    what: str
    losses: dict[str, float]
    saved_losses: dict[str, float]
    sources: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def reproduced(self) -> bool:
        return bool(self.sources or self.error)


def read_reproducer(path: str) -> dict[str, Any]:
    """Load a file of ``OUTPUT_DIR/nonfinite``, which has plain types only.

    Raises:
        WeightsError: the file is missing, unreadable or of another kind.
    """
    with readable(path, "reproducer"):
        saved = read_torch(path)
    known = isinstance(saved, dict) and all(isinstance(saved.get(k), t) for k, t in _TYPES.items())
    if not known:
        raise WeightsError(f"'{path}' is not a reproducer; name a file of OUTPUT_DIR/nonfinite.")
    return saved


def replay(path: str, opts: Sequence[str] = ()) -> Replay:
    """Repeat the forward and backward of a saved step in one process.

    With several processes, losses that are normalised over all of them may differ.

    Args:
        path: a file of ``OUTPUT_DIR/nonfinite``.
        opts: KEY VALUE overrides of the run's config, such as another device.

    Raises:
        ConfigError, DataError, WeightsError: the file, or a file of its config, cannot be used.
        DistillError: the forward fails for another reason.
    """
    saved = read_reproducer(path)
    # A version without a balance had constant weights, whatever the default is now.
    weights = [] if "balance" in saved else ["MODEL.DISTILL.BALANCE.MODE", "none"]
    cfg = _config(path, saved["config"], [*weights, *opts])
    if cfg.DETERMINISTIC:
        be_deterministic()
    model = build_distill_model(cfg).train()
    with readable(path, "reproducer"):
        model.load_state_dict(with_renamed_keys(saved["model"], HEADS, f"'{path}'"))
        student = getattr(model, "student", model)
        StudentState(student).load_state_dict(saved["student_state"])
        quantization = build_quantization(cfg, student)
        if quantization is not None:
            quantization.load_state_dict(saved[PART])
        balance = balance_of(model)
        if balance is not None:
            balance.load_state_dict(saved["balance"])
        batch = from_plain(saved["batch"])
        named = with_renamed_keys(saved["losses"], LOSSES, f"'{path}'")
        saved_losses = {name: float(value) for name, value in named.items()}
        step = (saved["seed"], saved["iteration"], saved["rank"])
        seed_step(model, *step)
    result = Replay(saved["what"], {}, saved_losses)
    with EventStorage(saved["iteration"]):
        try:
            with forward_context(cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED):
                parts = pieces(batch, cfg.SOLVER.ACCUMULATE, unlabeled_of(model))
                found = _forward(model, parts, step, result.sources)
                losses = _checked_mean(found, cfg.SOLVER.ACCUMULATE, result.sources)
        except DistillError:
            raise
        except Exception as e:
            result.error = one_line(e)
            if says_nonfinite(e):
                return result
            kind = type(e).__name__
            raise DistillError(f"The forward of '{path}' fails: {kind} {result.error}") from e
        result.losses = {k: float(v.detach()) for k, v in losses.items()}
        if not result.sources:
            for name, weights in bad_gradients(losses, model).items():
                result.sources += [f"gradient of {name} in {weight}" for weight in weights]
    return result


def _forward(
    model: nn.Module,
    parts: Sequence[Piece],
    step: tuple[int, int, int],
    sources: list[str],
) -> list[dict[str, Tensor]]:
    """Return the losses of each piece, and add everything that is not finite to ``sources``.

    Args:
        parts: pieces of the batch.
        step: seed of the run, iteration and rank.
    """
    for prefix, network in _networks(model).items():
        weights = network.state_dict()
        sources += [f"weight {prefix}{name}" for name, x in weights.items() if _is_nonfinite(x)]
    images = (x for piece in parts for x in piece.images)
    sources += [f"image {x.get('file_name')}" for x in images if _is_nonfinite(x)]
    found: list[dict[str, Tensor]] = []
    with _watch_modules(model, sources):
        for piece in parts:
            seed_step(model, *step, part=piece.number)
            found.append(piece.weighted(model(piece.images)))
    return found


def _checked_mean(
    found: Sequence[dict[str, Tensor]], parts: int, sources: list[str]
) -> dict[str, Tensor]:
    """Return the losses of the step, and add those that are not finite to ``sources``."""
    losses = mean_losses(found, parts)
    sources += [f"loss {name}" for name, x in losses.items() if _is_nonfinite(x.detach())]
    return losses


def _config(path: str, text: str, opts: Sequence[str]) -> CfgNode:
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, f"{os.path.basename(path)}.yaml")  # messages name it
        with readable(path, "reproducer"), open(file, "w") as f:
            f.write(text)
        return setup_config(file, opts)


def _networks(model: nn.Module) -> dict[str, nn.Module]:
    """Return student and teachers by the prefix of their modules' names."""
    teachers = model.teachers if isinstance(model, DistillModel) else {}
    own = {f"teacher.{name}." if name else "teacher.": x.model for name, x in teachers.items()}
    return {"": model, **own}


@contextmanager
def _watch_modules(model: nn.Module, sources: list[str]) -> Iterator[None]:
    """Add the modules whose outputs are not finite, although their inputs are, to ``sources``.

    Only the innermost of nested modules is added.
    """
    before: list[int] = []  # number of sources at the entry of each module that is running

    def enter(*_: Any) -> None:
        before.append(len(sources))

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            innermost = before.pop() == len(sources)
            if innermost and _is_nonfinite(output) and not _is_nonfinite((args, kwargs)):
                sources.append(f"output of {name} ({type(module).__name__})")

        return hook

    handles = []
    for prefix, network in _networks(model).items():
        for name, module in network.named_modules():
            if name:  # the whole network has only the losses as outputs
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave(prefix + name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_nonfinite(value: Any) -> bool:
    """Return True if any number inside ``value`` is not finite."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and not bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return any(map(_is_nonfinite, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_nonfinite, value))
    if isinstance(value, Instances):
        return _is_nonfinite(value.get_fields())
    if is_dataclass(value) and not isinstance(value, type):
        return _is_nonfinite(vars(value))
    return hasattr(value, "tensor") and _is_nonfinite(value.tensor)  # Boxes, ImageList


# ---- Command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reproducer", help="a file of OUTPUT_DIR/nonfinite")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")


def run(args: argparse.Namespace) -> int:
    result = replay(args.reproducer, args.opts)
    show(result)
    return 0 if result.reproduced else 1


def show(result: Replay) -> None:
    # Text of a file is printed without markup and without line breaks.
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"The run said: {result.what}")
    table = Table("loss", "in the run", "here")
    for name in {**result.saved_losses, **result.losses}:
        values = (result.saved_losses.get(name), result.losses.get(name))
        table.add_row(name, *("" if v is None else f"{v:.6g}" for v in values))
    console.print(table)
    if result.error:
        console.print(f"detectron2 stopped the forward: {result.error}")
    if not result.reproduced:
        console.print("Everything is finite here.")
    for k, source in enumerate(result.sources[:10]):
        console.print(f"{'first not finite' if k == 0 else 'then'}: {source}")
    if len(result.sources) > 10:
        console.print(f"and {len(result.sources) - 10} more")
