"""DATASETS.UNLABELED: a step with images whose only labels are what the teacher says."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import create_ddp_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import EventStorage
from PIL import Image

from distill import DistillModel, cli
from distill.doctor import examine
from distill.engine.train_loop import pieces
from distill.modeling.unlabeled import unlabeled_of
from distill.structures import UNLABELED
from tests.support.loops import gradients, loop_of
from tests.support.networks import distill_opts, distilled, image_dict
from tests.support.processes import WORLD, needs_loopback, spawn, starts_processes
from tests.support.trainings import (
    Interrupted,
    Interruption,
    Shapes,
    differences,
    distillation_file,
    train,
    trainable_cfg,
    write_teacher,
)

NODE = "MODEL.DISTILL.UNLABELED"
ON = ("DATASETS.UNLABELED", ("more",), f"{NODE}.SCORE", [0.05])


def labeled(number: int = 2, objects: int = 2, semantic: bool = False) -> list[dict[str, Any]]:
    return [image_dict(k, 64, 64 + 16 * k, objects, semantic) for k in range(number)]


def unlabeled(number: int = 2) -> list[dict[str, Any]]:
    images = [image_dict(10 + k, 64 + 16 * k, 64, objects=0) for k in range(number)]
    return [{k: v for k, v in x.items() if k != "sem_seg"} | {UNLABELED: True} for x in images]


def built(family: str, heads: Any, *opts: Any) -> DistillModel:
    return distilled(family, heads, *ON, *opts)


@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_labelled_images_are_trained_to_the_bit(family: str, tmp_path: Path) -> None:
    """Random numbers, the loss normalizer and the log are those of labelled images only."""
    model = built(family, ["FitNet"], "MODEL.DISTILL.FITNET.WEIGHT", 0.0)
    alone = gradients(model, labeled(), 1, tmp_path)
    normalizer = getattr(model.student, "loss_normalizer", None)
    again = built(family, ["FitNet"], "MODEL.DISTILL.FITNET.WEIGHT", 0.0)
    mixed = gradients(again, [*labeled(), *unlabeled()], 1, tmp_path)
    assert not differences(alone, mixed) and len(alone) > 10
    assert getattr(again.student, "loss_normalizer", None) == normalizer
    assert isinstance(model.student, DenseDetector) == (normalizer is not None)


@pytest.mark.parametrize("family", ["faster", "mask"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_detections_teach_as_annotations(family: str, weight: float, tmp_path: Path) -> None:
    """A step equals that in two parts, of which the second is annotated by the detections."""
    heads = ["FitNet", "FGD", "ROIKD"]
    model = built(family, heads, f"{NODE}.WEIGHT", weight)
    own = model.unlabeled
    assert own is not None and not own.idle
    with EventStorage():
        annotated, _ = model._with_labels(own, unlabeled())
    assert sum(len(x["instances"]) for x in annotated) > 0
    mixed = gradients(model, [*labeled(), *unlabeled()], 1, tmp_path)
    plain = distilled(family, heads)
    batch = [*labeled(), *({k: v for k, v in x.items() if k != UNLABELED} for x in annotated)]
    if weight:
        assert not differences(mixed, gradients(plain, batch, 2, tmp_path))
        return
    with EventStorage() as storage:
        loop_of(plain, [batch], 2, tmp_path).run_step()
        expected = {k: x.median(1) for k, x in storage.histories().items()}
    with EventStorage() as storage:
        loop_of(model, [[*labeled(), *unlabeled()]], 1, tmp_path).run_step()
        found = {k: x.median(1) for k, x in storage.histories().items()}
    assert found["loss_fgd/p3"] == pytest.approx(expected["loss_fgd/p3"])
    assert found["loss_cls"] != expected["loss_cls"]


@pytest.mark.parametrize("family", ["semantic", "rtmdet_ins", "cascade"])
def test_every_parameter_gets_a_gradient(family: str, tmp_path: Path) -> None:
    """Processes exchange gradients in the backward of labelled images, which reaches all."""
    model = built(family, ["FitNet"])
    batch = [*labeled(semantic=family == "semantic"), *unlabeled(4)]
    own = unlabeled_of(model)
    assert [len(x.images) for x in pieces(batch, 1, own)] == [4, 2]
    found = gradients(model, batch, 1, tmp_path)
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained and all(x.isfinite().all() for x in found.values())


def test_parts_have_both_kinds_and_own_random_numbers() -> None:
    model = built("faster", ["FitNet"], f"{NODE}.WEIGHT", 0.5)
    found = pieces([*labeled(4), *unlabeled(2)], 2, unlabeled_of(model))
    assert [(len(x.images), x.number) for x in found] == [(1, 2), (2, 0), (1, 3), (2, 1)]
    one = torch.ones(())
    shares = [x.weighted({"loss_cls": one, "loss_fitnet/p2": one}) for x in found[:2]]
    assert shares[0]["loss_cls"] == pytest.approx(0.5 / 2.5)
    assert shares[0]["loss_fitnet/p2"] == pytest.approx(1 / 3)
    for name in shares[0]:
        assert shares[0][name] + shares[1][name] == pytest.approx(1)


def test_the_weight_rises(tmp_path: Path) -> None:
    model = built("faster", ["FGD"], f"{NODE}.WEIGHT", 0.5, f"{NODE}.WARMUP_ITERS", 10)
    own = unlabeled_of(model)
    assert own is not None
    weights = []
    for iteration in (0, 5, 10, 20):
        with EventStorage(iteration):
            weights.append(own.task_weight())
    assert weights == [0, 0.25, 0.5, 0.5]
    with EventStorage() as storage:
        loop_of(model, [[*labeled(), *unlabeled()]], 1, tmp_path).run_step()
        shown = storage.latest()
    assert shown["unlabeled/objects_per_image"][0] > 0
    assert shown["unlabeled/images_without_objects"][0] in (0, 0.5)


def test_detections_are_asked_only_if_something_reads_them() -> None:
    for heads, weight, asked in (("FitNet", 0.0, 0), ("FitNet", 1.0, 1), ("FGD", 0.0, 1)):
        model: Any = built("faster", [heads], f"{NODE}.WEIGHT", weight)
        calls: list[int] = []
        detect = model.teacher.model.roi_heads.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        with EventStorage():
            losses = model(unlabeled())
        detect.remove()
        assert len(calls) == asked
        assert ("loss_cls" in losses) == (weight > 0)


def test_the_balance_measures_both(tmp_path: Path) -> None:
    balanced = ("MODEL.DISTILL.BALANCE.MODE", "gradient")
    model = built("faster", ["FitNet"], *balanced)
    loop = loop_of(model, [[*labeled(), *unlabeled()]] * 2, 1, tmp_path)
    with EventStorage() as storage:
        loop.run_step()
        first: Any = copy.copy(loop.balance.measured["backbone.p3"]["FitNet"])  # type: ignore
        loop.iter = storage.iter = 1
        loop.run_step()
        assert storage.latest()["kd_ratio/fitnet/backbone.p3"][0] > 0
    alone = loop_of(built("faster", ["FitNet"], *balanced), [labeled()], 1, tmp_path)
    with EventStorage():
        alone.run_step()
    own: Any = alone.balance.measured["backbone.p3"]["FitNet"]  # type: ignore[union-attr]
    assert own.task == pytest.approx(first.task)  # the task has labelled images only
    assert own.head != pytest.approx(first.head, rel=1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for k in range(5):
        Image.effect_noise((64, 64), 20 * k + 20).convert("RGB").save(path / f"{k}.png")
    return path


def config(shapes: Shapes, folder: Path, output: Path, *opts: Any) -> Any:
    teacher = write_teacher(folder.parent, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    own = ("DATASETS.FOLDER_FORMAT", (("more", str(folder)),), *ON, f"{NODE}.WEIGHT", 1.0)
    heads = distill_opts("faster", ["IMA", "FGD"])
    return trainable_cfg("faster", shapes, output, *heads, *teacher, *own, *opts)


@pytest.mark.e2e
@pytest.mark.parametrize("amp", [False, True])
def test_a_resumed_training_ends_with_the_same_bits(
    amp: bool, shapes: Shapes, folder: Path, tmp_path: Path, catalogues: None
) -> None:
    opts = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.AMP.ENABLED", amp)
    whole = train(config(shapes, folder, tmp_path / "whole", *opts))
    halted = config(shapes, folder, tmp_path / "halted", *opts)
    with pytest.raises(Interrupted):
        train(halted, Interruption(3))
    resumed = train(halted, resume=True, seed=4)
    assert not differences(whole["model"], resumed["model"])
    assert not differences(whole["distill"], resumed["distill"])


# ---- Several processes.


def two_steps(rank: int, folder: Path) -> None:
    """Take two steps, and write the gradients of the last one."""
    model = built("faster", ["FitNet"])
    ddp = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    batch = [image_dict(rank, 64, 64), unlabeled()[rank]]
    loop = loop_of(model, [batch, batch], 1, folder, ddp)
    with EventStorage() as storage:
        for iteration in range(2):
            loop.iter = storage.iter = iteration
            loop.run_step()
    torch.save({k: p.grad for k, p in model.named_parameters()}, folder / f"{rank}.pth")


@pytest.mark.slow
@starts_processes
@needs_loopback
def test_processes_exchange_the_sum_of_both_backwards(tmp_path: Path) -> None:
    spawn(two_steps, tmp_path)
    first, second = (torch.load(tmp_path / f"{k}.pth", weights_only=True) for k in range(WORLD))
    assert not differences(first, second)
    assert any(x is not None and x.any() for x in first.values())


# ---- The doctor.


@pytest.mark.slow
def test_the_doctor_shows_what_the_teacher_says(
    shapes: Shapes, folder: Path, tmp_path: Path, catalogues: None
) -> None:
    cfg = config(shapes, folder, tmp_path / "out", "SOLVER.MAX_ITER", 4)
    drawing = tmp_path / "drawing.png"
    report = examine(cfg, drawing=str(drawing))
    assert report.unlabeled and report.unlabeled.images == 16 and report.unlabeled.objects > 0
    assert report.cost and report.cost.batch == 4
    assert not report.errors
    with Image.open(drawing) as image:
        assert image.size > (4 * 64, 4 * 64)
    unsure = config(shapes, folder, tmp_path / "out", f"{NODE}.SCORE", [1.0])
    report = examine(unsure)
    assert any("finds no object in 16 unlabelled images" in x for x in report.warnings)


def test_a_drawing_needs_images(
    shapes: Shapes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["doctor", "--config-file", distillation_file(tmp_path, shapes), "--draw-unlabeled"]
    assert cli.main([*command, str(tmp_path / "a.png")]) == 2
    assert "DATASETS.UNLABELED is empty; " in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "a.jpg")]) == 2
    assert "a.jpg' is no .png file in an existing folder" in capsys.readouterr().err
