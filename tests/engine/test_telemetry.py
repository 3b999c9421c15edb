"""Test the measurements in the log of a run, and that they do not change the run."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from distill.engine import Trainer
from distill.engine.hooks import KDRatioHook, TelemetryHook, memory_mb
from distill.engine.telemetry import gradient_cosines
from distill.engine.train_loop import seed_step
from distill.heads.base import head_of
from tests.support.networks import distill_opts, distilled, image_dict
from tests.support.trainings import differences, trainable_cfg, write_teacher

CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", 8)
Shapes = tuple[str, str, str]


def test_head_of_a_loss() -> None:
    heads = ("IMA", "FitNet")
    assert head_of("loss_fitnet/p3", heads) == "FitNet"
    assert head_of("loss_ima", heads) == "IMA"
    assert [head_of(x, heads) for x in ("loss_cls", "loss_imaginary", "ima", "loss_mkd/p2")] == (
        [None] * 4
    )


# ---- Cosines.


def cosines(**losses: Tensor) -> dict[str, float]:
    parameters = [x for x in (A, B) if x.requires_grad]
    return gradient_cosines(losses, ("One", "Two"), parameters)


A = torch.tensor([1.0, 2.0], requires_grad=True)
B = torch.tensor([3.0], requires_grad=True)


def test_cosines_of_known_directions() -> None:
    task = (A * torch.tensor([3.0, 4.0])).sum()
    for loss, cosine in (
        (2 * task, 1.0),
        (-task, -1.0),
        ((A * torch.tensor([4.0, -3.0])).sum(), 0.0),
        ((A * torch.tensor([1.0, 0.0])).sum(), 0.6),
        (B.sum(), 0.0),  # other weights
        (B.sum() + task, 5 / math.sqrt(26)),
        (0 * task, 0.0),  # a head without anything to compare
        (torch.zeros(()), 0.0),  # and one without a graph
    ):
        assert cosines(loss_box=task, loss_one=loss) == {
            "kd_cosine/one": pytest.approx(cosine, abs=1e-7)
        }
    assert cosines(loss_box=0 * task, loss_one=task) == {"kd_cosine/one": 0.0}
    assert cosines(loss_box=task) == {}  # no head
    assert cosines(loss_one=task) == {}  # no task


def test_levels_of_a_head_and_losses_of_the_task_are_summed() -> None:
    x, y = A
    found = cosines(
        **{"loss_cls": x, "loss_box": y, "loss_one/p2": x, "loss_one/p3": -y, "loss_two": x + y}
    )
    expected = {"kd_cosine/one": 0.0, "kd_cosine/two": 1.0}
    assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_huge_and_tiny_gradients(scale: float) -> None:
    """Their squares overflow or underflow float32."""
    task = (A * torch.tensor([3.0, 4.0]) * scale).sum()
    loss = (A * torch.tensor([1.0, 0.0]) * scale).sum()
    assert cosines(loss_box=task, loss_one=loss)["kd_cosine/one"] == pytest.approx(0.6, rel=1e-6)


def test_losses_that_are_not_finite_have_no_cosine() -> None:
    task = A.sum()
    assert cosines(loss_box=task, loss_one=task * math.nan, loss_two=task) == {
        "kd_cosine/two": pytest.approx(1)
    }
    assert cosines(loss_box=task * math.inf, loss_one=task) == {}


def test_cosines_agree_with_separate_backward_passes() -> None:
    """The computation changes neither gradients nor the graph."""
    heads = ("FitNet", "IMA")
    model = distilled("faster", heads)
    inputs = [image_dict(1), image_dict(2, 64, 96)]

    def losses() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model.heads["IMA"].masks.reseed(5)
        with EventStorage():
            return model(inputs)

    def gradient(head: str | None) -> Tensor:
        """Return the student's gradient in float64 for the losses of a head or of the task."""
        model.zero_grad()
        sum(v for k, v in losses().items() if head_of(k, heads) == head).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in student]
        return torch.cat([g.flatten() for g in grads]).double()

    student = [p for p in model.student.parameters() if p.requires_grad]
    task = gradient(None)
    expected = {
        f"kd_cosine/{head.lower()}": float(torch.cosine_similarity(gradient(head), task, dim=0))
        for head in heads
    }
    model.zero_grad()
    ours = losses()
    found = gradient_cosines(ours, heads, student)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert all(0.0 < abs(x) < 0.99 for x in found.values())
    assert all(p.grad is None for p in model.parameters())
    sum(ours.values()).backward()  # the graph still exists


# ---- Runs.


def config(shapes: Shapes, folder: Path, *opts: Any, teacher_channels: int = 16) -> CfgNode:
    teacher = write_teacher(folder / "teacher", "faster", *CLASSES, fpn=teacher_channels)
    heads = distill_opts("faster", ("FitNet", "IMA"))
    return trainable_cfg(
        "faster", shapes, folder / "out", *heads, *teacher, "SOLVER.MAX_ITER", 6, *opts, norm="BN"
    )


def train(cfg: CfgNode) -> Trainer:
    seed_all_rng(3)
    trainer = Trainer(cfg)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    opts = ("MODEL.DISTILL.COSINE_PERIOD", 4, "MODEL.DISTILL.FITNET.STOP_ITER", 3)
    return train(config(shapes, folder, *opts)), folder / "out"


def history(trainer: Trainer, name: str) -> dict[int, float]:
    return {i: v for v, i in trainer.storage.history(name).values()}


@pytest.mark.e2e
def test_cosines_come_with_their_period(run: tuple[Trainer, Path]) -> None:
    assert list(history(run[0], "kd_cosine/ima")) == [0, 4]
    fitnet = history(run[0], "kd_cosine/fitnet")
    assert fitnet[0] != 0 and fitnet[4] == 0  # stopped


@pytest.mark.e2e
def test_cosines_are_those_in_the_student(shapes: Shapes, tmp_path: Path) -> None:
    """The task has no gradient in adapters, and their gradients would make every cosine smaller."""
    heads = ("FitNet", "IMA")
    trainer = Trainer(config(shapes, tmp_path, "SOLVER.MAX_ITER", 1, teacher_channels=24))
    model = copy.deepcopy(trainer.model)
    batch = next(iter(trainer.build_train_loader(trainer.cfg)))
    seed_step(model, seed=0, iteration=0)
    with EventStorage():
        losses = model(batch)
    own, every = (
        gradient_cosines(losses, heads, [p for p in x.parameters() if p.requires_grad])
        for x in (model.student, model)
    )
    trainer.train()
    for name, cosine in own.items():
        assert history(trainer, name)[0] == pytest.approx(cosine, rel=1e-6)
        assert abs(cosine) > 1.01 * abs(every[name])


@pytest.mark.e2e
def test_measuring_changes_nothing(
    shapes: Shapes, tmp_path: Path, run: tuple[Trainer, Path]
) -> None:
    stop = ("MODEL.DISTILL.FITNET.STOP_ITER", 3)
    never = train(config(shapes, tmp_path, "MODEL.DISTILL.COSINE_PERIOD", 0, *stop))
    assert not any(x.startswith("kd_cosine") for x in never.storage.latest())
    outputs = (run[1], tmp_path / "out")
    ends = [torch.load(x / "model_final.pth", weights_only=True) for x in outputs]
    assert differences(*ends) == []


@pytest.mark.e2e
def test_ratios_are_the_losses_over_the_task(run: tuple[Trainer, Path]) -> None:
    trainer = run[0]
    losses = [x for x in trainer.storage.histories() if x.startswith("loss_")]
    task = [x for x in losses if head_of(x, ("FitNet", "IMA")) is None]
    assert len(task) == 4
    for loss in ("fitnet/p2", "fitnet/p6", "ima"):
        ratios = history(trainer, f"kd_ratio/{loss}")
        assert list(ratios) == list(range(6))
        for i, ratio in ratios.items():
            total = sum(history(trainer, x)[i] for x in task)
            own = history(trainer, f"loss_{loss}")[i]
            assert ratio == pytest.approx(own / total) and (own > 0) == (i < 3 or loss == "ima")


def test_ratios_skip_an_iteration_without_losses() -> None:
    hook = KDRatioHook(("FitNet",))
    with EventStorage() as storage:
        storage.put_scalars(loss_cls=2.0, loss_fitnet=1.0)
        hook.after_step()
        storage.step()
        hook.after_step()
    assert storage.history("kd_ratio/fitnet").values() == [(0.5, 0)]


LOGGED = {
    *("loss_cls", "loss_fitnet/p3", "loss_ima", "total_loss", "lr"),
    *("kd_ratio/fitnet/p3", "kd_ratio/ima", "kd_cosine/fitnet", "kd_cosine/ima", "grad_norm"),
    *("images_per_second", "data_time", "data_share", "memory_mb", "data/left_out", "time"),
}


@pytest.mark.e2e
def test_metrics_json_and_tensorboard(run: tuple[Trainer, Path]) -> None:
    rows = [json.loads(x) for x in (run[1] / "metrics.json").read_text().splitlines()]
    logged = {k: v for row in rows for k, v in row.items()}
    assert logged.keys() >= LOGGED
    assert logged["data/left_out"] == 0 and logged["grad_norm"] > 0 and logged["memory_mb"] > 10
    assert 0 < logged["data_share"] < 1
    board = EventAccumulator(str(run[1])).Reload()
    assert set(board.Tags()["scalars"]) >= LOGGED
    assert board.Scalars("loss_ima")[-1].value == pytest.approx(logged["loss_ima"])


@pytest.mark.e2e
def test_the_gradient_norm_is_that_before_clipping(shapes: Shapes, tmp_path: Path) -> None:
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-6)
    trainer = train(config(shapes, tmp_path, *clip, "SOLVER.MAX_ITER", 1))
    assert history(trainer, "grad_norm")[0] > 0.01
    parameters = [p for p in trainer.model.parameters() if p.grad is not None]
    assert max(float(p.grad.abs().max()) for p in parameters) <= 1e-6  # type: ignore[union-attr]


@pytest.mark.e2e
def test_dropped_images_are_counted(shapes: Shapes, tmp_path: Path) -> None:
    _, annotations, images = shapes
    (tmp_path / "images").mkdir()
    for path in Path(images).iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / path.name).write_bytes(b"not an image")
    ours = ("left_out", annotations, str(tmp_path / "images"))
    cfg = config(ours, tmp_path, "DATALOADER.ON_BAD_IMAGE", "drop")
    assert history(train(cfg), "data/left_out")[5] == 1


def test_speed_is_that_of_this_iteration() -> None:
    hook = TelemetryHook(8, left_out=lambda: 3)
    with EventStorage() as storage:
        hook.after_step()  # detectron2 does not measure the first iterations
        storage.step()
        storage.put_scalars(time=0.5, data_time=0.2)
        hook.after_step()
        storage.step()
        storage.put_scalar("time", 0.25)  # a skipped step
        hook.after_step()
    assert storage.history("images_per_second").values() == [(16, 1), (32, 2)]
    assert storage.history("data_share").values() == [(0.4, 1)]
    assert storage.history("data/left_out").values() == [(3, 0), (3, 1), (3, 2)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_is_the_peak_in_mebibytes() -> None:
    status = Path("/proc/self/status").read_text()
    peak = next(x.split()[1] for x in status.splitlines() if x.startswith("VmHWM"))
    assert memory_mb() == pytest.approx(int(peak) / 1024, rel=0.02)
