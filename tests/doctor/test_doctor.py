"""Test that the doctor reports what the training does, and that it does not change the run."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from distill import cli
from distill.doctor import DoctorReport, examine, examine_heads, examine_outputs
from distill.doctor.dry_run import build_dry_run, preserved
from distill.doctor.examine import measure_cost
from distill.doctor.losses import loss_warnings
from distill.doctor.report import LossRow, TeacherCheck
from distill.doctor.teacher import (
    OBJECTS,
    PIXELS,
    as_asked,
    no_better_than_chance,
    objects_found,
    pixel_accuracy,
)
from distill.engine import Trainer
from distill.engine.health import HIGHEST_RATIO, LOWEST_RATIO, cosine_warning, ratio_warning
from distill.errors import WeightsError
from distill.heads import DISTILL_HEAD_REGISTRY, FitNet
from distill.heads.classes import ClassMap
from distill.utils.seeding import seed_globally
from tests.support.networks import PAFPN, STOCK_P3_P7, distill_opts, outspoken_model, write_config
from tests.support.processes import call, starts_processes
from tests.support.trainings import Shared, trainable_cfg, write_teacher

Shapes = tuple[str, str, str]
EIGHT = ("MODEL.ROI_HEADS.NUM_CLASSES", 8, "MODEL.RETINANET.NUM_CLASSES", 8)
EIGHT += ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 12)
CLASSES = ("circle", "ellipse", "square", "triangle", "pentagon", "star", "cross", "crescent")
NAMED = ("MODEL.DISTILL.TEACHER.CLASSES", CLASSES)
HEADS = {
    "faster": ("FitNet", "TID", "ROIKD"),
    "mask": ("IMA", "MKD", "MaskLogitKD"),
    "retinanet": ("FitNet", "TID", "DenseKD"),
    "semantic": ("IMA", "MKD"),
}
SEMANTIC = "shapes_tiny_doctor_semantic"


def distilled_cfg(
    folder: Path, shapes: Shapes, family: str, heads: Sequence[str], *opts: Any, **kw: Any
) -> CfgNode:
    """Return the config of a tiny student with a wider teacher of another seed."""
    teacher = write_teacher(folder, family, *EIGHT, fpn=24)
    opts = (*EIGHT, *distill_opts(family, heads), *teacher, *opts)
    return trainable_cfg(family, shapes, folder / "output", *opts, **kw)


def semantic_set(shapes: Shapes) -> str:
    """Register the images with their semantic labels."""
    if SEMANTIC not in DatasetCatalog.list():
        labels = Path(shapes[2]).parents[1] / "semantic_train"
        entries = [
            {
                **{"file_name": str(x), "sem_seg_file_name": str(labels / f"{x.stem}.png")},
                **{"height": 64, "width": 64, "image_id": k},
            }
            for k, x in enumerate(sorted(Path(shapes[2]).glob("*.jpg")))
        ]
        DatasetCatalog.register(SEMANTIC, lambda: entries)
        names = [f"class {k}" for k in range(12)]
        MetadataCatalog.get(SEMANTIC).set(
            stuff_classes=names, evaluator_type="sem_seg", ignore_label=255
        )
    return SEMANTIC


def written(cfg: CfgNode, folder: Path) -> list[str]:
    """Write ``cfg`` to a file, and return the arguments of the command line for it."""
    return ["--config-file", str(write_config(cfg, folder / "config.yaml"))]


def rows(report: DoctorReport) -> dict[str, LossRow]:
    return {row.loss: row for row in report.losses}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- Numbers.


@pytest.mark.parametrize("family", HEADS)
def test_every_family(family: str, tmp_path: Path, shapes: Shapes) -> None:
    cfg = distilled_cfg(tmp_path, shapes, family, HEADS[family])
    if family == "semantic":
        cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TRAIN = (), (semantic_set(shapes),)
    report = examine(cfg)
    trainer = Trainer(cfg)
    with EventStorage():
        logged = trainer._trainer.model(next(iter(trainer._trainer.data_loader)))
    prefixes = tuple(f"loss_{head.lower()}" for head in HEADS[family])
    kd = {name for name in logged if name.split("/")[0] in prefixes}
    assert set(rows(report)) == {"task", *kd, *prefixes}
    task = rows(report)["task"]
    for row in report.losses[1:]:
        assert row.ratio == pytest.approx(row.value / task.value)
        assert row.gradient > 0 or row.loss.startswith("loss_tid/")  # a level may have no instance
        assert row.cosine is None or abs(row.cosine) <= 1
    for head in prefixes:
        parts = [row.value for name, row in rows(report).items() if name.startswith(f"{head}/")]
        assert rows(report)[head].value == pytest.approx(sum(parts) or rows(report)[head].value)
    fields = {row.output.split()[0] for row in report.outputs}
    teachers_only = {"detections"}  # a student detects nothing in training
    assert fields == set(trainer._trainer.model.family.outputs) - teachers_only
    assert report.teacher_check is not None and report.cost is not None
    assert report.teacher_check.measure == (PIXELS if family == "semantic" else OBJECTS)
    assert report.cost.step_seconds > 0 and report.cost.memory_mb > 100
    assert report.cost.hours == pytest.approx(
        (report.cost.step_seconds + report.cost.data_seconds) * cfg.SOLVER.MAX_ITER / 3600
    )
    assert not report.errors
    json.dumps(asdict(report))


def test_losses_gradients_and_cosines_are_those_of_the_training(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    """FitNet of a RetinaNet, which uses no random numbers, is computed independently."""
    levels = ("p3", "p4")
    opts = ("MODEL.DISTILL.FITNET.IN_FEATURES", levels, "MODEL.DISTILL.FITNET.WEIGHT", 3.0)
    cfg = distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"], *opts)
    assert cli.main(["doctor", *written(cfg, tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    seed_globally(cfg.SEED)
    trainer = Trainer(cfg)
    model, batches = trainer._trainer.model, iter(trainer._trainer.data_loader)
    student, parameters = model.student, [p for p in model.student.parameters() if p.requires_grad]
    expected: dict[str, list[tuple[float, float, float]]] = {}

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]
        return torch.cat([g.flatten() for g in flat]).double()

    for _ in range(2):
        batch = next(batches)
        with EventStorage():
            task = sum(student(batch).values())
        images = student.preprocess_image(batch).tensor
        maps = student.backbone(images)
        with torch.no_grad():
            answer = model.teacher.model.backbone(images)
        losses = {"task": task}
        for level in levels:
            adapter = model.heads["FitNet"].adapters[level]
            gap = F.conv2d(maps[level], adapter.weight, adapter.bias) - answer[level]
            losses[f"loss_fitnet/{level}"] = 3.0 * gap.square().mean() / len(levels)
        losses["loss_fitnet"] = losses["loss_fitnet/p3"] + losses["loss_fitnet/p4"]
        own = gradient(task)
        for name, loss in losses.items():
            g = gradient(loss)
            cosine = float(g @ own / (g.norm() * own.norm()))
            expected.setdefault(name, []).append((loss.item(), float(g.norm()), cosine))
    found = {row["loss"]: row for row in report["losses"]}
    assert set(found) == set(expected)
    for name, values in expected.items():
        value, norm, cosine = torch.tensor(values).mean(0).tolist()
        assert found[name]["value"] == pytest.approx(value, rel=1e-4)
        assert found[name]["gradient"] == pytest.approx(norm, rel=1e-3)
        assert found[name]["cosine"] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.slow
def test_the_factors_of_a_balance_are_predicted(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are those of a training whose weights stay as they are."""
    opts = ("MODEL.DISTILL.BALANCE.MODE", "gradient", "MODEL.DISTILL.BALANCE.FADE", 0.5)
    heads = ["FitNet", "DenseKD"]
    cfg = distilled_cfg(tmp_path, shapes, "retinanet", heads, *opts, "SOLVER.BASE_LR", 0.0)
    assert cli.main(["doctor", *written(cfg, tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not [x for x in report["warnings"] if "of the task" in x]
    seed_globally(cfg.SEED)
    trainer = Trainer(cfg)
    loop, balance = trainer._trainer, trainer.balance
    assert balance is not None
    with EventStorage():
        for loop.iter in range(2):
            loop.run_step()
    found = {(row["head"], row["tensor"]): row["factor"] for row in report["balance"]}
    assert {head for head, _ in found} == set(heads)
    for (head, tensor), factor in found.items():
        assert factor == pytest.approx(balance.factor(tensor, head), rel=1e-3)
    (task, *rows) = report["losses"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["gradient"] / task["gradient"])
    assert cli.main(["doctor", *written(cfg, tmp_path)]) == 0
    assert "tensor of the student" in capsys.readouterr().out


@pytest.mark.slow
def test_the_schedule_of_a_head_does_not_matter(tmp_path: Path, shapes: Shapes) -> None:
    found = []
    for schedule in ((), ("WARMUP_ITERS", 100), ("STOP_ITER", 1)):
        opts = [x for x in schedule if isinstance(x, int)]
        key = [f"MODEL.DISTILL.FITNET.{x}" for x in schedule if isinstance(x, str)]
        report = examine(distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"], *key, *opts))
        found.append([(row.loss, row.value) for row in report.losses])
    assert found[0] == found[1] == found[2]
    assert found[0][1][1] > 0


# ---- Outputs.


def test_outputs_are_shown_with_those_they_are_compared_with(
    tmp_path: Path, shapes: Shapes
) -> None:
    """A RetinaNet on P3 to P7 teaches a Faster R-CNN on P2 to P6 by feature maps only."""
    teacher = write_teacher(tmp_path, "retinanet", *EIGHT, *STOCK_P3_P7, fpn=24)
    opts = (*distill_opts("faster", ["FitNet"]), *teacher)
    key = ("MODEL.DISTILL.FITNET.IN_FEATURES", ("p2", "p4", "p5"))
    report = examine_outputs(trainable_cfg("faster", shapes, tmp_path / "out", *opts, *key))
    features = [
        (
            row.student and (row.student.name, row.student.stride),
            row.teacher and (row.teacher.name, row.teacher.stride),
            [(x.head, x.adapter) for x in row.heads],
        )
        for row in report.outputs
        if row.output == "features"
    ]
    assert features == [
        (("p2", 4), ("p3", 8), [("FitNet", "1x1 conv 16→24, resized /8→/4")]),
        (("p3", 8), ("p3", 8), []),
        (("p4", 16), ("p4", 16), [("FitNet", "1x1 conv 16→24")]),
        (("p5", 32), ("p5", 32), [("FitNet", "1x1 conv 16→24")]),
        (("p6", 64), ("p6", 64), []),
        (None, ("p7", 128), []),
    ]
    assert all(row.teacher is None for row in report.outputs if row.output != "features")
    assert not report.losses and report.cost is None
    shapes_of = {row.student.name: row.student.shape for row in report.outputs[:5] if row.student}
    height, width = shapes_of["p2"][2] * 4, shapes_of["p2"][3] * 4
    assert shapes_of["p4"] == [2, 16, height // 16, width // 16]


def test_predictions_are_paired_by_the_heads(tmp_path: Path, shapes: Shapes) -> None:
    some = ("circle", "unheard of", *CLASSES[2:])
    opts = ("MODEL.DISTILL.TEACHER.CLASSES", some, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4)
    cfg = distilled_cfg(tmp_path, shapes, "mask", ["ROIKD", "MaskLogitKD", "DenseKD"], *opts)
    report = examine_outputs(cfg)
    by_output = {(row.output, row.student.name): row for row in report.outputs if row.student}
    for key, comparison in {
        ("dense logits", "p3"): ("DenseKD", "identity"),
        ("rois logits", "stage 0"): ("ROIKD", "7 of 8 classes"),
        ("masks logits", "masks"): ("MaskLogitKD", "7 of 8 classes, resized 14→8"),
    }.items():
        row = by_output[key]
        assert [(x.head, x.adapter) for x in row.heads] == [comparison]
        assert row.teacher and row.teacher.name == key[1]
    assert by_output["rois logits", "stage 0"].student.shape == [32, 9]  # type: ignore[union-attr]
    assert report.classes
    assert (report.classes.relation, report.classes.shared) == ("mapped", 7)
    assert report.classes.only_student == ["ellipse"]
    assert report.classes.only_teacher == ["unheard of"]


def test_another_order_of_classes(tmp_path: Path, shapes: Shapes) -> None:
    opts = ("MODEL.DISTILL.TEACHER.CLASSES", CLASSES[::-1])
    report = examine_outputs(distilled_cfg(tmp_path, shapes, "faster", ["FitNet"], *opts))
    assert report.classes and report.classes.relation == "other order"


def test_preprocessing_side_by_side(tmp_path: Path, shapes: Shapes) -> None:
    own = ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0])
    cfg = distilled_cfg(tmp_path, shapes, "faster", ["FitNet"], *own)
    settings = {x.name: (x.student, x.teacher) for x in examine_outputs(cfg).preprocessing}
    assert settings["INPUT.FORMAT"] == ("RGB", "BGR")
    assert settings["MODEL.PIXEL_MEAN"] == ("[1.0, 2.0, 3.0]", "[103.53, 116.28, 123.675]")
    assert settings["INPUT.MIN_SIZE_TRAIN"] == ("(64, 80)", "(800,)")
    assert settings["square padding"] == ("none", "none")
    padded_size, seen = settings["padded size of the first batch"]
    assert padded_size == seen and padded_size in ("64x64", "96x96")  # 64 or 80 pixels, padded


def test_a_teacher_at_twice_the_size(tmp_path: Path, shapes: Shapes) -> None:
    scale = ("MODEL.DISTILL.TEACHER.SCALE", 2.0)
    cfg = distilled_cfg(tmp_path, shapes, "faster", ["FitNet", "ROIKD"], *scale)
    report = examine_outputs(cfg)
    settings = {x.name: (x.student, x.teacher) for x in report.preprocessing}
    own, seen = settings["padded size of the first batch"]
    assert seen and [2 * int(x) for x in own.split("x")] == [int(x) for x in seen.split("x")]
    rows = {x.student.name: x for x in report.outputs if x.output == "features" and x.student}
    p2 = rows["p2"].teacher
    assert p2 and (p2.name, p2.stride) == ("p3", 4) and not rows["p6"].teacher
    listed = {row.head: row.problem for row in examine_heads(cfg).registered_heads}
    assert listed["ROIKD"] is None and "TEACHER.SCALE 2)" in str(listed["DenseKD"])


def test_the_teacher_predicts_at_its_own_size(tmp_path: Path, shapes: Shapes) -> None:
    """Its predictions are compared with the ground truth, in the student's pixels."""
    opts = ("MODEL.DISTILL.TEACHER.SCALE", 2.0)
    dry_run = build_dry_run(
        distilled_cfg(tmp_path, shapes, "faster", ["FitNet"], *opts), str(tmp_path)
    )
    assert dry_run.teacher
    image = torch.zeros(3, 40, 60)
    (asked,) = as_asked(dry_run.teacher, [{"image": image}])
    assert asked["image"].shape == (3, 80, 120)
    assert (asked["height"], asked["width"]) == (40, 60)


# ---- Heads, and plain networks.


def test_every_registered_head_works_or_says_why(tmp_path: Path, shapes: Shapes) -> None:
    """MSSD is configured and does not work, which is not an error in a list to choose from."""
    cfg = distilled_cfg(tmp_path, shapes, "faster", ["MSSD"])
    report = examine_heads(cfg)
    listed = {row.head: row for row in report.registered_heads}
    assert set(listed) == {name for name, _ in DISTILL_HEAD_REGISTRY}
    working = {name for name, row in listed.items() if row.problem is None}
    assert working >= {"FitNet", "IMA", "MKD", "TID", "ROIKD", "DenseKD"}
    assert "masks" in str(listed["MaskLogitKD"].problem)
    assert listed["MSSD"].configured and "pafpn" in str(listed["MSSD"].problem)
    assert not listed["MSSD"].needs_teacher and listed["ROIKD"].compares == ["rois"]


def test_without_a_teacher_nothing_compares(tmp_path: Path, shapes: Shapes) -> None:
    report = examine_heads(trainable_cfg("faster", shapes, tmp_path, *PAFPN))
    problems = {row.head: row.problem for row in report.registered_heads}
    assert problems.pop("LGD") is problems.pop("MSSD") is None
    assert all("teacher" in str(problem) for problem in problems.values())


def test_a_plain_network_and_an_empty_list_of_heads(tmp_path: Path, shapes: Shapes) -> None:
    plain = examine(trainable_cfg("faster", shapes, tmp_path))
    empty = examine(trainable_cfg("faster", shapes, tmp_path, *distill_opts("faster", ())))
    assert any("GeneralizedRCNN trains without distillation" in x for x in plain.notes)
    assert any("MODEL.DISTILL.HEADS is empty" in x for x in empty.notes)
    for report in (plain, empty):
        assert [row.loss for row in report.losses] == ["task"]
        assert report.losses[0].gradient > 0 and not report.teacher
        assert any(x.name == "INPUT.FORMAT" and x.student == "BGR" for x in report.preprocessing)
        assert report.warnings == report.errors == []
    assert not plain.outputs and {row.output for row in empty.outputs} > {
        "features",
        "rois logits",
    }


def test_mixed_precision(tmp_path: Path, shapes: Shapes) -> None:
    found = []
    for enabled in (False, True):
        opts = ("SOLVER.AMP.ENABLED", enabled)
        found.append(examine(distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"], *opts)))
    types = [{t.student.dtype for t in x.outputs[:5] if t.student} for x in found]
    assert types == [{"float32"}, {"bfloat16"}]
    for a, b in zip(found[0].losses, found[1].losses):
        assert (a.value, a.gradient) == pytest.approx((b.value, b.gradient), rel=0.05)
        assert a.value != b.value


def test_self_distillation(tmp_path: Path, shapes: Shapes) -> None:
    opts = (*distill_opts("retinanet", ["MSSD"]), *PAFPN, "SOLVER.MAX_ITER", 10)
    report = examine(trainable_cfg("retinanet", shapes, tmp_path, *opts), teacher_images=1)
    compared = {
        (row.output, row.student.name) for row in report.outputs if row.heads and row.student
    }
    levels = ("p2", "p3", "p4", "p5")  # P6 is made from P5 and has no shallow map
    assert compared == {(output, x) for output in ("features", "shallow") for x in levels}
    assert {x.adapter for row in report.outputs for x in row.heads} == {"with itself"}
    assert rows(report)["loss_mssd"].gradient > 0 and report.teacher_check is None
    assert any("teaches itself" in x for x in report.notes)
    assert any("there is no teacher" in x for x in report.notes)
    assert any("MSSD made students worse" in x for x in report.warnings)


# ---- Warnings.


def warnings_of(cfg: CfgNode, word: str) -> list[str]:
    return [x for x in examine(cfg).warnings if word in x]


@pytest.mark.parametrize("weight, word", [(1e-9, "raise"), (1e6, "lower"), (1.0, "")])
def test_a_loss_out_of_proportion(weight: float, word: str, tmp_path: Path, shapes: Shapes) -> None:
    opts = ("MODEL.DISTILL.FITNET.WEIGHT", weight)
    cfg = distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"], *opts)
    found = warnings_of(cfg, "of the task loss")
    assert len(found) == bool(word)
    assert all(f"{word} MODEL.DISTILL.FITNET.WEIGHT" in x for x in found)


@pytest.mark.slow
def test_a_dead_loss_and_a_teacher_from_the_students_file(tmp_path: Path, shapes: Shapes) -> None:
    teacher = write_teacher(tmp_path, "retinanet", *EIGHT)
    opts = (*distill_opts("retinanet", ["FitNet"]), *teacher, "MODEL.WEIGHTS", teacher[-1])
    cfg = trainable_cfg("retinanet", shapes, tmp_path / "output", *opts)
    report = examine(cfg)
    assert rows(report)["loss_fitnet"].value == 0
    assert any("fitnet is dead: its loss" in x for x in report.warnings)
    assert any("have the same weights" in x for x in report.warnings)
    off = ("MODEL.DISTILL.FITNET.WEIGHT", 0.0)
    quiet = trainable_cfg("retinanet", shapes, tmp_path / "output", *opts, *off)
    assert not warnings_of(quiet, "is dead")
    assert any("FitNet is off" in x for x in examine(quiet).notes)


def test_a_loss_without_gradient(
    tmp_path: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that detaches the student by mistake has such a loss."""
    monkeypatch.setattr(
        FitNet, "loss", lambda self, s, t, stride, batch: (s.detach() - t).square().mean()
    )
    report = examine(distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"]))
    assert rows(report)["loss_fitnet"].value > 0 == rows(report)["loss_fitnet"].gradient
    assert any("fitnet is dead: its gradient" in x for x in report.warnings)


def test_a_gradient_against_the_task(
    tmp_path: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = LossRow("loss_fitnet", "FitNet", value=1.0, ratio=1.0, gradient=1.0, cosine=-0.6)
    head = build_dry_run(
        distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"]), str(tmp_path)
    ).heads
    (sentence,) = loss_warnings([row], head)
    assert "opposes that of the task" in sentence and "-0.60" in sentence
    row.cosine = -0.4
    assert not loss_warnings([row], head)


@pytest.mark.parametrize("norm, images, warned", [("BN", 2, 1), ("BN", 4, 0), ("FrozenBN", 2, 0)])
def test_batch_norm_of_a_tiny_batch(
    norm: str, images: int, warned: int, tmp_path: Path, shapes: Shapes
) -> None:
    opts = ("SOLVER.IMS_PER_BATCH", images)
    cfg = trainable_cfg("retinanet", shapes, tmp_path / "output", *opts, norm=norm)
    assert len(warnings_of(cfg, "batch normalisation")) == warned


def test_unknown_and_known_class_names(tmp_path: Path, shapes: Shapes) -> None:
    cfg = distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"])
    assert warnings_of(cfg, "class names are unknown")
    cfg = distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"], *NAMED)
    assert not warnings_of(cfg, "class names")


def test_the_bounds_and_their_sentences() -> None:
    assert ratio_warning("fitnet", LOWEST_RATIO) is ratio_warning("fitnet", HIGHEST_RATIO) is None
    assert "0.0005 of the task loss" in str(ratio_warning("loss_mkd/p2/fea", 0.0005))
    assert "MODEL.DISTILL.MKD.WEIGHT" in str(ratio_warning("loss_mkd/p2/fea", 0.0005))
    assert "lower MODEL.DISTILL.MKD.WEIGHT" in str(ratio_warning("mkd", 11))
    assert ratio_warning("mkd", math.nan) is ratio_warning("mkd", math.inf) is None
    assert cosine_warning("mkd", -0.5) is cosine_warning("mkd", math.nan) is None
    assert "-0.51" in str(cosine_warning("mkd", -0.51))


# ---- Predictions of the teacher.


STILL = ("INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (64,))


def train_by_heart(folder: Path, shapes: Shapes) -> None:
    steps = ("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", 0.002, "SOLVER.MAX_ITER", 200)
    loss = ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou", "SOLVER.STEPS", ())
    unit = ("MODEL.RETINANET.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0), "SOLVER.IMS_PER_BATCH", 6)
    cfg = trainable_cfg("retinanet", shapes, folder, *steps, *STILL, *loss, *unit, norm="BN")
    torch.set_num_threads(1)
    seed_globally(0)
    Trainer(cfg).train()


@pytest.fixture
def taught(shared: Shared, shapes: Shapes) -> list[Any]:
    """Overrides of a distillation by a RetinaNet that knows the six scenes by heart."""
    folder = shared("taught", lambda folder: train_by_heart(folder, shapes))
    return [
        *distill_opts("retinanet", ["FitNet", "DenseKD"]),
        *("MODEL.DISTILL.TEACHER.CONFIG_FILE", str(folder / "student.yaml")),
        *("DATASETS.TEST", (shapes[0],), *STILL),
    ]


def test_an_untrained_teacher_is_no_better_than_chance(tmp_path: Path, shapes: Shapes) -> None:
    report = examine(distilled_cfg(tmp_path, shapes, "faster", ["FitNet"], *NAMED))
    assert report.teacher_check and report.teacher_check.by_class
    assert any("no better than chance" in x for x in report.warnings)


# On one worker, because another one would only wait for the teacher.
one_worker = pytest.mark.xdist_group("taught")


@pytest.mark.long
@one_worker
@pytest.mark.slow
@pytest.mark.e2e
def test_a_trained_teacher_is_better_and_its_ap_is_the_evaluators(
    taught: list[Any], tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = trainable_cfg("retinanet", shapes, tmp_path / "output", *taught)
    assert cli.main(["doctor", *written(cfg, tmp_path), "--teacher-ap", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    check = report["teacher_check"]
    assert check["value"] > 0.5 > check["chance"]
    assert not [x for x in report["warnings"] if "chance" in x or "class names" in x]
    model = build_dry_run(cfg, str(tmp_path)).teacher.model  # type: ignore[union-attr]
    loader = Trainer.build_test_loader(cfg, shapes[0])
    image_ids = [x["image_id"] for x in DatasetCatalog.get(shapes[0])[:4]]
    evaluator = COCOEvaluator(shapes[0], output_dir=str(tmp_path / "evaluation"))
    whole = evaluator.evaluate
    evaluator.evaluate = lambda: whole(img_ids=image_ids)  # type: ignore[method-assign]
    expected = inference_on_dataset(model, loader, evaluator)["bbox"]["AP"]
    assert report["teacher_ap"]["images"] == 4
    assert report["teacher_ap"]["metrics"]["bbox/AP"] == pytest.approx(expected)
    assert expected > 50


@pytest.mark.long
@one_worker
@pytest.mark.e2e
def test_classes_in_another_order_are_matched_by_name(
    taught: list[Any], tmp_path: Path, shapes: Shapes
) -> None:
    """With wrong names, the predictions of the same teacher are wrong."""
    names = (CLASSES, CLASSES[1:] + CLASSES[:1])
    found = []
    for classes in names:
        opts = (*taught, "MODEL.DISTILL.TEACHER.CLASSES", classes)
        cfg = trainable_cfg("retinanet", shapes, tmp_path / "output", *opts)
        report = examine(cfg, teacher_images=6)
        assert report.teacher_check and report.teacher_ap
        found.append((report.teacher_check.value, report.teacher_ap.metrics["bbox/AP50"]))
    (right, right_ap), (wrong, wrong_ap) = found
    assert wrong < right - 0.1 and wrong_ap < 0.5 * right_ap


def test_ap_of_a_semantic_teacher(tmp_path: Path, shapes: Shapes) -> None:
    cfg = distilled_cfg(tmp_path, shapes, "semantic", ["FitNet"])
    name = semantic_set(shapes)
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), (name,), (name,)
    report = examine(cfg, teacher_images=3)
    assert report.teacher_ap and report.teacher_ap.images == 3
    assert 0 <= report.teacher_ap.metrics["sem_seg/mIoU"] <= 100


def test_ap_that_cannot_be_measured(tmp_path: Path, shapes: Shapes) -> None:
    name = "shapes_tiny_doctor_voc"
    if name not in DatasetCatalog.list():
        image = next(Path(shapes[2]).iterdir())
        DatasetCatalog.register(name, lambda: [{"file_name": str(image)}])
        MetadataCatalog.get(name).set(evaluator_type="pascal_voc")
    for tests, word in (((), "DATASETS.TEST is empty"), ((name,), "needs the whole data set")):
        cfg = distilled_cfg(tmp_path, shapes, "faster", ["FitNet"], "DATASETS.TEST", tests)
        report = examine(cfg, teacher_images=3)
        assert report.teacher_ap is None and any(word in x for x in report.notes)


def objects(boxes: list[list[float]], labels: list[int], predicted: bool) -> Instances:
    instances = Instances((64, 64))
    instances.set("pred_boxes" if predicted else "gt_boxes", Boxes(torch.tensor(boxes)))
    instances.set("pred_classes" if predicted else "gt_classes", torch.tensor(labels))
    return instances


def test_objects_found_by_hand() -> None:
    """There are two images; the teacher's classes are b and a, without c."""
    here, there = [0.0, 0.0, 10.0, 10.0], [30.0, 30.0, 50.0, 50.0]
    truths = [objects([here, there, here], [0, 1, 2], False), objects([there], [0], False)]
    predictions = [objects([here, there], [1, 1], True), objects([there], [1], True)]
    check = objects_found(truths, predictions, ClassMap(("a", "b", "c"), ("b", "a")))
    # The objects of class a are found in both images, b is predicted as a, and c does not count.
    # With the predictions for the other image, only the a of the second image is found.
    assert check == TeacherCheck(OBJECTS, pytest.approx(2 / 3), pytest.approx(1 / 3), 3, True)
    nameless = objects_found(truths, predictions, ClassMap(("a", "b", "c"), ("x", "y")))
    assert nameless and (nameless.value, nameless.count, nameless.by_class) == (1.0, 4, False)
    assert objects_found([truths[0][:0]], predictions[:1], ClassMap(("a",), ("a",))) is None


def test_pixel_accuracy_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 255, -1])
    predicted = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0])
    check = pixel_accuracy(labels, predicted, ClassMap(("a", "b", "c"), ("b", "a")), 255)
    assert check == TeacherCheck(PIXELS, pytest.approx(3 / 5), pytest.approx(3 / 5), 5, True)
    assert no_better_than_chance(check)
    assert pixel_accuracy(torch.tensor([255]), labels[:1], ClassMap(("a",), ("a",)), 255) is None


@pytest.mark.parametrize(
    "value, chance, count, warned",
    [(0.0, 0.0, 10, True), (0.1, 0.0, 10, True), (0.5, 0.0, 10, False), (0.23, 0.1, 13, True)],
)
def test_chance_has_an_error_too(value: float, chance: float, count: int, warned: bool) -> None:
    assert no_better_than_chance(TeacherCheck(OBJECTS, value, chance, count, True)) == warned


# ---- Weights and errors.


def test_weights_of_the_backbone_alone(tmp_path: Path, shapes: Shapes) -> None:
    weights = outspoken_model("retinanet", *EIGHT).state_dict()
    some = {k: v for k, v in weights.items() if k.startswith("backbone.bottom_up.")}
    torch.save({"model": some}, tmp_path / "backbone.pth")
    opts = ("MODEL.WEIGHTS", str(tmp_path / "backbone.pth"))
    cfg = trainable_cfg("retinanet", shapes, tmp_path / "output", *opts)
    dry_run = build_dry_run(cfg, str(tmp_path))
    state = dry_run.student.state_dict()
    counted = [k for k in state if not k.endswith(("running_mean", "running_var"))]
    assert dry_run.weights.total == len(counted)
    assert dry_run.weights.filled == len([k for k in counted if k in some])
    lacking = [k for k in counted if k not in some]
    assert dry_run.weights.unfilled == {
        group: sum(k.startswith(f"{group}.") for k in lacking) for group in ("backbone", "head")
    }
    for name, value in state.items():
        assert torch.equal(value, some[name]) if name in some else value.abs().max() < 1000


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Run a doctor that ends with 2, and return its stdout and the one line on stderr."""
    capsys.readouterr()
    assert cli.main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return captured.out, line


def test_weights_of_another_network(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {"other": torch.zeros(3)}}, tmp_path / "other.pth")
    opts = ("MODEL.WEIGHTS", str(tmp_path / "other.pth"))
    cfg = trainable_cfg("retinanet", shapes, tmp_path / "output", *opts)
    _, line = failing(written(cfg, tmp_path), capsys)
    assert "MODEL.WEIGHTS: " in line and "fills 0 of the network's" in line


@pytest.mark.parametrize("damage", ["nan in the teacher", "no such file", "misspelt key"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_errors(
    damage: str,
    flags: list[str],
    tmp_path: Path,
    shapes: Shapes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"])
    arguments, opts, words = [*written(cfg, tmp_path), *flags], [], ["loss_fitnet/p2 is nan"]
    if damage == "nan in the teacher":
        saved = torch.load(tmp_path / "teacher.pth", weights_only=True)
        saved["model"]["backbone.fpn_output2.bias"][0] = math.nan
        torch.save(saved, tmp_path / "teacher.pth")
        capsys.readouterr()
        assert cli.main(["doctor", *arguments]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
        assert "batch 1" in lines[0] and "batch 2" in lines[1] and ".jpg" in lines[0]
        out, line = captured.out, lines[0]
    else:
        opts = ["MODEL.WEIGHTS", "gone.pth"] if "file" in damage else ["SOLVER.STEP", "3"]
        words = opts[:1]
        out, line = failing([*arguments, *opts], capsys)
    assert all(word in line for word in words)
    if flags:
        report = json.loads(out)
        assert report["errors"][0] == line.removeprefix("error: ")
    else:
        assert ("Networks" in out) == (damage == "nan in the teacher")


def test_a_partly_loaded_teacher_is_an_error(tmp_path: Path, shapes: Shapes) -> None:
    cfg = distilled_cfg(tmp_path, shapes, "faster", ["FitNet"])
    saved = torch.load(tmp_path / "teacher.pth", weights_only=True)
    del saved["model"]["roi_heads.box_predictor.cls_score.weight"]
    torch.save(saved, tmp_path / "teacher.pth")
    with pytest.raises(WeightsError, match=r"cls_score\.weight is missing"):
        examine(cfg)


def test_data_without_what_the_network_trains_on(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = trainable_cfg("panoptic", shapes, tmp_path / "output")
    _, line = failing(written(cfg, tmp_path), capsys)
    assert "sem_seg" in line and "MODEL.META_ARCHITECTURE" in line


# ---- The run is unchanged.


@pytest.mark.slow
def test_the_output_folder_stays_as_it_is(
    tmp_path: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = distilled_cfg(tmp_path, shapes, "faster", ["FitNet"], "DATASETS.TEST", (shapes[0],))
    examine(cfg, teacher_images=2)
    assert not Path(cfg.OUTPUT_DIR).exists()
    Path(cfg.OUTPUT_DIR).mkdir()
    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_final.pth")
    monkeypatch.chdir(tmp_path)
    before, dumped = snapshot(tmp_path), cfg.dump()
    examine(cfg, teacher_images=2)
    assert snapshot(tmp_path) == before and cfg.dump() == dumped


def test_steps_leave_no_trace_in_the_networks(tmp_path: Path, shapes: Shapes) -> None:
    """This holds for weights, statistics, RetinaNet's normaliser, optimizer and learning rate."""
    cfg = distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"], norm="BN")
    dry_run = build_dry_run(cfg, str(tmp_path))
    before = {k: v.clone() for k, v in dry_run.model.state_dict().items()}
    attributes = dict(vars(dry_run.student))  # the normaliser appears at the first step
    rates = [group["lr"] for group in dry_run.optimizer.param_groups]
    batches = [next(dry_run.batches) for _ in range(2)]
    with preserved(dry_run):
        measure_cost(dry_run, batches, 1.0, cfg)
        changed = [
            k for k, v in dry_run.model.state_dict().items() if not torch.equal(v, before[k])
        ]
        assert changed and all("running" in k or "num_batches" in k for k in changed)
        assert dry_run.optimizer.state and "loss_normalizer" in vars(dry_run.student)
    assert all(torch.equal(v, before[k]) for k, v in dry_run.model.state_dict().items())
    assert vars(dry_run.student) == attributes
    assert [group["lr"] for group in dry_run.optimizer.param_groups] == rates != [0.0] * len(rates)
    assert not dry_run.optimizer.state and dry_run.model.heads["FitNet"].factor() == 1.0


# ---- Text of the report.


@pytest.mark.slow
def test_the_text_is_short_and_plain(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = distilled_cfg(tmp_path, shapes, "mask", HEADS["mask"], "DATASETS.TEST", (shapes[0],))
    assert cli.main(["doctor", *written(cfg, tmp_path), "--teacher-ap", "1"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert not captured.err and "\x1b" not in captured.out
    assert max(len(line.rstrip()) for line in lines) <= 100
    titles = [
        *("Networks", "Preprocessing", "Classes", "Outputs", "Losses", "Teacher", "Cost"),
        *("Notes", "Warnings"),
    ]
    assert [line for line in lines if line in titles] == titles
    warned = [line for line in lines[lines.index("Warnings") :] if line.startswith("- ")]
    assert lines[-1] == f"0 errors, {len(warned)} warnings"


@pytest.mark.parametrize("flag, title", [("--list-outputs", "Outputs"), ("--list-heads", "Heads")])
def test_the_lists(
    flag: str, title: str, tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = distilled_cfg(tmp_path, shapes, "faster", ["FitNet"], *NAMED)
    assert cli.main(["doctor", *written(cfg, tmp_path), flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert title in lines and "Losses" not in lines and lines[-1] == "0 errors, 0 warnings"
    assert any("FitNet" in line for line in lines)


@pytest.mark.slow
@starts_processes
def test_the_command(tmp_path: Path, shapes: Shapes) -> None:
    cfg = distilled_cfg(tmp_path, shapes, "retinanet", ["FitNet"], *NAMED)
    argv = ["doctor", *written(cfg, tmp_path), "--json"]
    done = call(cli.main, argv, folder=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["heads"] == ["FitNet"]
    # Not to the last bit: TorchScript may have optimised the focal loss earlier in this process.
    for theirs, ours in zip(report["losses"], examine(cfg).losses, strict=True):
        for key, value in asdict(ours).items():
            close = pytest.approx(value, rel=1e-6, abs=1e-9) if type(value) is float else value
            assert theirs[key] == close, key
