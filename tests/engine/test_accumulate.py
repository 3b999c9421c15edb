"""SOLVER.ACCUMULATE: an iteration in parts is one step of the optimizer, with the mean gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import create_ddp_model
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distill.engine import Trainer
from distill.engine.train_loop import mean_losses, micro_batches, seed_step
from distill.errors import ConfigError
from tests.support.loops import Gradients, gradients, loop_of
from tests.support.networks import distill_opts, distilled, image_dict, tiny_model
from tests.support.processes import WORLD, needs_loopback, spawn, starts_processes
from tests.support.trainings import Shapes, trainable_cfg, write_teacher


def assert_alike(a: Gradients, b: Gradients) -> None:
    assert a.keys() == b.keys() and len(a) > 10
    largest = max(float(x.abs().max()) for x in a.values())
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5 * largest


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_equal_the_larger_batch(parts: int, tmp_path: Path) -> None:
    """Here the normalizers are constant: images of one size, every pixel of which counts."""
    model = distilled("semantic", ["FitNet", "CWD"])
    batch = [image_dict(k, 64, 80, semantic=True) for k in range(4)]
    for x in batch:
        x["sem_seg"].clamp_(0, 3)
    whole = gradients(model, batch, 1, tmp_path)
    assert_alike(gradients(model, batch, parts, tmp_path), whole)


def test_otherwise_they_have_the_mean_of_their_gradients(tmp_path: Path) -> None:
    """The losses of a detector are normalized by the objects of a part, as the docs say."""
    model = distilled("faster", ["IMA", "ROIKD"])
    batch = [image_dict(0, 64, 80, objects=5), image_dict(1, 96, 64, objects=1)]
    found = gradients(model, batch, 2, tmp_path)
    for parameter in model.parameters():
        parameter.grad = None
    for k, part in enumerate(micro_batches(batch, 2)):
        seed_step(model, 0, 0, part=k)
        with EventStorage():
            (sum(model(part).values()) / 2).backward()
    expected = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert_alike(found, expected)


def test_the_parts_of_yolov5_are_added(tmp_path: Path) -> None:
    """As the authors add the gradients of batches, each of which is a sum over its images."""
    batch = [image_dict(0, 64, 64, objects=5), image_dict(1, 64, 64, objects=1)]
    parts = tiny_model("yolov5", "SOLVER.ACCUMULATE", 2).train()
    found = gradients(parts, batch, 2, tmp_path)
    model = tiny_model("yolov5").train()
    with EventStorage():
        losses = [model(part) for part in micro_batches(batch, 2)]
        whole, in_parts = model(batch), mean_losses(parts([x]) for x in batch)
    sum(x for part in losses for x in part.values()).backward()
    assert_alike(found, {k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    # The objectness is a mean over all cells, so that it is exactly that of the whole batch.
    torch.testing.assert_close(in_parts["loss_obj"], whole["loss_obj"])


def test_parts_have_random_numbers_of_their_own() -> None:
    model = distilled("faster", ["IMA"], "MODEL.DISTILL.IMA.MASK_RATIO", 0.5)
    drawn = []
    for part in (0, 1, 0):
        seed_step(model, 0, 0, part=part)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_losses_are_those_of_the_whole_iteration() -> None:
    parts: list[dict[str, Tensor]] = [{"a": torch.tensor(1.0)}, {"a": torch.tensor(4.0)}]
    assert mean_losses(parts) == {"a": torch.tensor(2.5)}
    assert mean_losses(parts[:1]) is parts[0]


def test_a_batch_that_cannot_be_divided(shapes: Shapes, tmp_path: Path) -> None:
    cfg = trainable_cfg("faster", shapes, tmp_path, "SOLVER.ACCUMULATE", 4)
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH is 2; .*SOLVER\.ACCUMULATE 4"):
        Trainer(cfg)


@pytest.mark.e2e
@pytest.mark.parametrize("amp", [False, True])
def test_a_training_in_parts(amp: bool, shapes: Shapes, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    opts = (*distill_opts("faster", ["IMA", "FGD"]), *teacher, "SOLVER.ACCUMULATE", 2)
    opts += ("SOLVER.MAX_ITER", 3, "SOLVER.AMP.ENABLED", amp, "MODEL.DISTILL.COSINE_PERIOD", 1)
    trainer = Trainer(trainable_cfg("faster", shapes, tmp_path / "out", *opts))
    steps = []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.iter))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert steps == [0, 1, 2]
    assert {"loss_ima", "kd_cosine/ima"} <= trainer.storage.latest().keys()


# ---- Several processes.


def train(rank: int, folder: Path) -> None:
    """Take a step in two parts, and write the gradients and the number of exchanges."""
    model = distilled("semantic", ["FitNet"])
    ddp = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    assert isinstance(ddp, DistributedDataParallel)
    exchanges: list[int] = []

    def exchange(
        state: object, bucket: torch.distributed.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        exchanges.append(bucket.index())
        tensor = bucket.buffer().div_(WORLD)
        work: Any = torch.distributed.all_reduce(tensor, async_op=True)
        future: torch.futures.Future[torch.Tensor] = work.get_future()
        return future.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, exchange)
    batch = [image_dict(2 * rank + k, 64, 80, semantic=True) for k in range(2)]
    for x in batch:
        x["sem_seg"].clamp_(0, 3)
    with EventStorage():
        loop_of(model, [batch], 2, folder, ddp).run_step()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    torch.save((found, exchanges), folder / f"{rank}.pth")


@pytest.mark.slow
@starts_processes
@needs_loopback
def test_processes_exchange_their_gradients_once(tmp_path: Path) -> None:
    spawn(train, tmp_path)
    (first, exchanges), (second, _) = (
        torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(WORLD)
    )
    assert len(exchanges) == len(set(exchanges))  # each bucket once
    batch = [image_dict(k, 64, 80, semantic=True) for k in range(4)]
    for x in batch:
        x["sem_seg"].clamp_(0, 3)
    whole = gradients(distilled("semantic", ["FitNet"]), batch, 1, tmp_path)
    assert_alike(first, second)
    assert_alike(first, whole)
