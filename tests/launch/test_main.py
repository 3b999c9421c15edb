"""The training step and the command line: mixed precision, several processes, evaluation."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from torch import nn

from distill.config import get_distill_cfg, teacher_config
from distill.data.datasets import class_names
from distill.engine import Trainer
from distill.engine.nonfinite import FiniteGuard
from distill.engine.setup import scale_to_workers
from distill.engine.train_loop import TrainLoop
from distill.errors import WeightsError
from distill.launch.main import argument_parser, configure, finished_checkpoint, main
from tests.support.networks import distill_opts, tiny_cfg, write_config
from tests.support.processes import call, needs_loopback, script, starts_processes
from tests.support.trainings import trainable_cfg, write_teacher

ROOT = Path(__file__).resolve().parents[2]


def test_the_heads_schedules_scale_with_the_workers() -> None:
    """And the average's decay, as the iterations do when a schedule for 8 GPUs runs on one."""
    opts = ("MODEL.DISTILL.FITNET.WARMUP_ITERS", 10, "MODEL.DISTILL.FITNET.STOP_ITER", 60)
    cfg = tiny_cfg("faster", *distill_opts("faster", ["FitNet"]), *opts)
    cfg.SOLVER.EMA.DECAY, cfg.MODEL.YOLOX.L1_FROM_ITER = 0.99, 70
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 8, 16, 90
    scaled = scale_to_workers(cfg)
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.IMS_PER_BATCH) == (720, 2)
    assert scaled.MODEL.DISTILL.FITNET.WARMUP_ITERS == 80
    assert scaled.MODEL.DISTILL.FITNET.STOP_ITER == 480
    assert scaled.SOLVER.EMA.WARMUP_ITERS == 16_000
    assert scaled.MODEL.YOLOX.L1_FROM_ITER == 560
    assert math.isclose(scaled.SOLVER.EMA.DECAY, 0.99 ** (1 / 8))
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 1
    assert scale_to_workers(cfg).MODEL.DISTILL.FITNET.STOP_ITER == 60


class Toy(nn.Module):
    """A loss whose gradient is far above the clipping threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, data: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * data).sum()}


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_gradients_are_clipped_after_the_scaler_has_unscaled_them(
    optimizer: str, storage: EventStorage
) -> None:
    cfg = get_distill_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 5.0
    weights = []
    for scale in (1.0, 2.0**16):
        model = Toy()
        options = {"fused": True} if optimizer == "AdamW" else {}
        wrapped = maybe_add_gradient_clipping(
            cfg, getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **options)
        )
        loader = [torch.tensor([3.0, 1e-3])] * 2
        guard = FiniteGuard(cfg, model, model, seed=0)
        loop = TrainLoop(model, loader, wrapped, amp=False, device="cpu", seed=0, guard=guard)
        loop.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        loop.run_step()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=0)


@pytest.mark.e2e
def test_amp_trains_saves_and_resumes(tmp_path: Path, shapes: tuple[str, str, str]) -> None:
    opts = write_teacher(tmp_path, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    opts += distill_opts("faster", ["IMA", "ROIKD"]) + ["SOLVER.AMP.ENABLED", True]
    for iterations in (2, 3):
        cfg = trainable_cfg("faster", shapes, tmp_path / "out", *opts, norm="BN")
        cfg.SOLVER.MAX_ITER = iterations
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == (0 if iterations == 2 else 2)
        trainer.train()
    weights = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    assert all(torch.isfinite(x).all() for x in weights.values())


def config_file(folder: Path, shapes: tuple[str, str, str]) -> str:
    opts = write_teacher(folder, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    opts += distill_opts("faster", ["IMA", "ROIKD"])
    cfg = trainable_cfg("faster", shapes, folder / "out", *opts, "SOLVER.MAX_ITER", 2, norm="BN")
    cfg.DATASETS.TEST = (shapes[0],)
    return str(write_config(cfg, folder / "config.yaml"))


TOOL = ROOT / "tools" / "train_net.py"


def launch(argv: list[str], folder: Path) -> None:
    script(TOOL, ["--num-gpus", "2", "--dist-url", "auto", *argv], folder)


def torchrun(argv: list[str], folder: Path) -> None:
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    os.execv(sys.executable, [sys.executable, *options, str(TOOL), *argv])


@pytest.mark.slow
@starts_processes
@needs_loopback
@pytest.mark.parametrize("launcher", [launch, pytest.param(torchrun, marks=pytest.mark.long)])
def test_two_processes(
    launcher: Callable[..., None], tmp_path: Path, shapes: tuple[str, str, str]
) -> None:
    argv = ["--config-file", config_file(tmp_path, shapes)]
    done = call(launcher, argv, tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    assert json.loads(rows[-1])["loss_ima"] > 0
    assert (tmp_path / "out" / "model_final.pth").is_file()


def test_evaluation_needs_no_training_data(
    tmp_path: Path, shapes: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(tmp_path, shapes)
    cfg = CfgNode.load_cfg(Path(path).read_text())
    student = tiny_cfg("faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8, norm="BN")
    torch.save({"model": build_model(student).state_dict()}, tmp_path / "student.pth")
    gone = ("gone_train", str(tmp_path / "gone.json"), str(tmp_path / "gone"))
    sets: list[Any] = [shapes, gone]
    assert [shapes[0]] == cfg.DATASETS.TEST
    code = main(
        [
            *("--eval-only", "--config-file", path, "DATASETS.COCO_FORMAT", str(sets)),
            *(
                "DATASETS.TRAIN",
                "('gone_train',)",
                "MODEL.DISTILL.TEACHER.CONFIG_FILE",
                "gone.yaml",
            ),
            *("MODEL.WEIGHTS", str(tmp_path / "student.pth")),
        ]
    )
    assert code == 0


def test_a_teachers_class_names_come_from_its_own_data(tmp_path: Path) -> None:
    annotations = tmp_path / "a.json"
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    annotations.write_text(json.dumps({"categories": categories}))
    teacher = tiny_cfg("faster")
    teacher.DATASETS.COCO_FORMAT = (("never_registered", str(annotations), str(tmp_path)),)
    teacher.DATASETS.TRAIN = ("never_registered",)
    write_config(teacher, tmp_path / "teacher.yaml")
    cfg = get_distill_cfg()
    cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.yaml")
    assert class_names(teacher_config(cfg)) == ("cat", "dog")  # by id, as detectron2 orders them
    annotations.unlink()
    assert class_names(teacher_config(cfg)) is None


def test_a_truncated_final_checkpoint_is_none(tmp_path: Path) -> None:
    cfg = tiny_cfg("faster", "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 6)
    path = tmp_path / "model_final.pth"
    torch.save({"iteration": 5, "model": {}}, path)
    assert finished_checkpoint(cfg) == str(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert finished_checkpoint(cfg) is None


def test_a_final_checkpoint_of_something_else_is_an_error(tmp_path: Path) -> None:
    cfg = tiny_cfg("faster", "OUTPUT_DIR", str(tmp_path))
    torch.save([1, 2], tmp_path / "model_final.pth")
    with pytest.raises(WeightsError, match=r"--resume.*model_final\.pth"):
        finished_checkpoint(cfg)


def test_a_resumed_run_needs_no_weights_of_timm(
    shapes: tuple[str, str, str], tmp_path: Path
) -> None:
    """The checkpoint has them; their file or the network may be gone."""
    timm = ("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.WEIGHTS", "r18.pth")
    cfg = trainable_cfg("faster", shapes, tmp_path / "out", *timm)
    write_config(cfg, tmp_path / "config.yaml")
    args = argument_parser().parse_args(
        [
            "--resume",
            "--config-file",
            str(tmp_path / "config.yaml"),
            "MODEL.TIMM.PRETRAINED",
            "True",
        ]
    )
    node = configure(args)[0].MODEL.TIMM
    assert (node.PRETRAINED, node.WEIGHTS) == (True, "r18.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_0000009.pth").touch()
    node = configure(args)[0].MODEL.TIMM
    assert (node.PRETRAINED, node.WEIGHTS) == (False, "")
