"""The figures of what methods look at: their arrays, their weights, images, errors."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.image import imread
from PIL import Image
from torch import Tensor

from distill import cli
from distill.analysis import visualize
from distill.analysis.training_samples import drawn, training_samples
from distill.engine import setup_config
from distill.heads.fpn import cell_labels
from tests.support.networks import PAFPN, distill_opts, outspoken_model, write_config
from tests.support.trainings import trainable_cfg, write_teacher

Shapes = tuple[str, str, str]
SEMANTIC = "shapes_tiny_semantic"  # semantic labels alone
EIGHT = ("MODEL.ROI_HEADS.NUM_CLASSES", 8, "MODEL.RETINANET.NUM_CLASSES", 8)
EIGHT += ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 12)
TID_ROWS = ["Score_T", "Score_S", "key area", "weak area", "M"]
IMAGES = ("MODEL.DISTILL.IMA.SCOPE", "image")
DETECTED = (
    *("MODEL.DISTILL.IMA.INSTANCES", "teacher"),
    *("MODEL.DISTILL.IMA.INSTANCE_SCORE", 0.0),  # the teacher is not trained
)
CASES: list[tuple[str, str, tuple[Any, ...], list[str]]] = [
    ("faster", "MSSD", PAFPN, ["mask M"]),
    ("retinanet", "MSSD", (*PAFPN, "MODEL.DISTILL.MSSD.MASK", "binary"), ["binary mask"]),
    ("mask", "MKD", (), ["attention A", "student", "teacher"]),
    ("semantic", "MKD", ("MODEL.DISTILL.MKD.ATTENTION", False), ["student", "teacher"]),
    ("faster", "IMA", (), ["image", "student", "teacher"]),
    ("mask", "IMA", (), ["image", "mask", "student", "teacher"]),
    ("retinanet", "IMA", IMAGES, ["student", "teacher"]),
    ("faster", "IMA", DETECTED, ["image", "student", "teacher"]),
    ("semantic", "IMA", (), ["cells", r"$\alpha$", "student", "teacher"]),
    ("faster", "TID", (), TID_ROWS),
    ("retinanet", "TID", (), TID_ROWS),
]
case_ids = [f"{head}-{family}" for family, head, _, _ in CASES]


@dataclass
class Run:
    """The command on one tiny config; the teacher is wider, so that the student needs adapters."""

    folder: Path
    arguments: list[str]
    cfg: CfgNode

    def main(self, image: str = "0", weights: str = visualize.RANDOM) -> int:
        out = str(self.folder / "figures")
        chosen = ["--weights", weights] if weights else []
        return cli.main(["visualize", *self.arguments, "--image", image, "--out", out, *chosen])

    def fails(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        """The one line on stderr."""
        capsys.readouterr()
        assert self.main(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and line.endswith(".")
        assert not (self.folder / "figures").exists()
        return line

    def look(self, name: str) -> tuple[Any, Any, dict[tuple[str, str], Any]]:
        """A head, what it saw of the first image, and its grid."""
        model, heads = visualize.build(self.cfg)
        entry = visualize.read_input(self.cfg, heads, "0")
        view = visualize.look(model, list(heads.values()), self.cfg, entry)[""]
        with torch.no_grad():
            return heads[name], view, visualize.GRIDS[type(heads[name])](heads[name], view)


def prepare(folder: Path, shapes: Shapes, family: str, heads: tuple[str, ...], *opts: Any) -> Run:
    teacher = write_teacher(folder, family, *EIGHT, fpn=24)
    opts = (*distill_opts(family, heads), *EIGHT, *teacher, *opts)
    cfg = trainable_cfg(family, shapes, folder / "output", *opts)
    if family == "semantic":
        cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TRAIN = (), (semantic_set(shapes),)
    config = write_config(cfg, folder / "config.yaml")
    return Run(folder, ["--config-file", str(config)], setup_config(str(config)))


def semantic_set(shapes: Shapes) -> str:
    """Register the labels next to the images; all of them are known."""
    if SEMANTIC not in DatasetCatalog.list():
        images = sorted(Path(shapes[2]).glob("*.jpg"))
        labels = Path(shapes[2]).parents[1] / "semantic_train"
        entries = [
            {"file_name": str(x), "sem_seg_file_name": str(labels / f"{x.stem}.png")}
            for x in images
        ]
        DatasetCatalog.register(SEMANTIC, lambda: entries)
        names = [f"class {k}" for k in range(12)]
        MetadataCatalog.get(SEMANTIC).set(stuff_classes=names, evaluator_type="sem_seg")
    return SEMANTIC


@pytest.mark.slow
@pytest.mark.parametrize("family, head, opts, rows", CASES, ids=case_ids)
def test_every_method_draws_its_rows(
    family: str,
    head: str,
    opts: tuple[Any, ...],
    rows: list[str],
    tmp_path: Path,
    shapes: Shapes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grids = []
    draw = visualize.draw
    monkeypatch.setattr(visualize, "draw", lambda *args: grids.append(args[0]) or draw(*args))
    assert prepare(tmp_path, shapes, family, (head,), *opts).main() == 0
    (grid,) = grids
    found = list(dict.fromkeys(row for row, _ in grid))
    assert len(found) == len(rows)
    for row, start in zip(found, rows):
        assert row.startswith(start)
        arrays = [panel.array for (r, _), panel in grid.items() if r == row]
        assert row == "image" or any(np.nanstd(x) > 0 for x in arrays)
    image_dict = imread(next((tmp_path / "figures").glob(f"*_{head.lower()}.png")))
    assert image_dict.std() > 0.1 and min(image_dict.shape[:2]) > 200


def test_mssd_lights_the_cells_inside_the_boxes(tmp_path: Path, shapes: Shapes) -> None:
    _, view, grid = prepare(tmp_path, shapes, "faster", ("MSSD",), *PAFPN).look("MSSD")
    panel = grid["mask M, σ² = 2", "p2, stride 4"]
    y, x = (np.indices(panel.array.shape) + 0.5) * 4
    inside = [(x >= x1) & (x <= x2) & (y >= y1) & (y <= y2) for x1, y1, x2, y2 in view.image.boxes]
    np.testing.assert_array_equal(panel.array > 0, np.any(inside, axis=0))
    assert panel.area == (0, 0, 64, 64)


def test_mkd_shows_what_its_loss_compares(tmp_path: Path, shapes: Shapes) -> None:
    """Without frequency mask: attention and magnitudes of the adapted maps, by hand."""
    opts = ("MODEL.DISTILL.MKD.MASK_RATIO", 0.0)
    head, view, grid = prepare(tmp_path, shapes, "faster", ("MKD",), *opts).look("MKD")
    column = "p3, stride 8"
    maps = head.maps(view.student, view.teacher)[1]
    s, t = (x[0].detach().double().abs().mean(0).numpy() for x in maps)
    np.testing.assert_allclose(grid["student mean|F̂|\nζ = 0", column].array, s, rtol=1e-5)
    np.testing.assert_allclose(grid["teacher mean|F|", column].array, t, rtol=1e-5)
    area = sum(np.exp(x / 0.5) / np.exp(x / 0.5).sum() for x in (s, t))
    np.testing.assert_allclose(grid["attention A", column].array, area / area.max(), rtol=1e-4)


def test_mkd_shows_the_frequency_masked_student(tmp_path: Path, shapes: Shapes) -> None:
    opts = ("MODEL.DISTILL.MKD.MASK_RATIO", 0.5)
    head, view, grid = prepare(tmp_path, shapes, "faster", ("MKD",), *opts).look("MKD")
    s = head.maps(view.student, view.teacher)[0][0][0].detach().abs().mean(0)
    shown = grid["student mean|F̂|\nζ = 0.5", "p2, stride 4"].array
    assert np.abs(shown - s.numpy()).mean() > 0.05 * s.mean()


def alpha(student: Tensor, teacher: Tensor, cells: Tensor) -> float:
    """α of IMA by hand: cosine of the standardized (C, H, W) maps over some cells, floor 0.1."""
    flat = [x.detach().double()[:, cells] for x in (student, teacher)]
    s, t = ((x - x.mean(1, True)) / (x.var(1, False, keepdim=True) + 1e-5).sqrt() for x in flat)
    norm = float(s.norm() * t.norm())  # 0 on a single cell
    return 0.1 + 0.9 * max(float((s * t).sum()) / norm if norm else 0, 0)


def noted(panel: Any) -> float:
    return float(re.findall(r"\$\\alpha\$ ([\d.]+)", panel.note)[0])


@pytest.mark.parametrize("family", ["retinanet", "faster", "mask", "semantic"])
def test_alpha_of_each_instance(family: str, tmp_path: Path, shapes: Shapes) -> None:
    opts = ("MODEL.DISTILL.IMA.MASK_RATIO", 0.0, "SEED", 3)  # some cosines are positive
    opts += IMAGES if family == "retinanet" else ()
    head, view, grid = prepare(tmp_path, shapes, family, ("IMA",), *opts).look("IMA")
    maps, batch = head.maps(view.student, view.teacher), view.student.batch
    if head.scope == "image":
        notes = [noted(x) for (row, _), x in grid.items() if row.startswith("student")]
        expected = [alpha(s[0], t[0], torch.ones(s.shape[2:]).bool()) for s, t in maps]
    elif head.scope == "class":
        labels = [cell_labels(batch.sem_seg, *s.shape[2:])[0] for s, _ in maps]
        cells = [x for (row, _), x in grid.items() if row.startswith("$")]
        notes = [float(text) for x in cells for _, _, text in x.marks]
        expected = [
            alpha(s[0], t[0], y == k) for (s, t), y in zip(maps, labels) for k in y.unique()
        ]
        assert all(np.isfinite(x.array).all() for x in cells)
    else:
        boxes, weight = head.instances(view.student, view.teacher)
        ((_, s, t),) = head.crops(maps, boxes)
        weight = torch.ones_like(s[:, :1]) if weight is None else weight
        notes = [noted(x) for (row, _), x in grid.items() if row == "image"]
        expected = [alpha(s[i], t[i], weight[i, 0] > 0) for i in range(len(s))]
        assert [x.area for (row, _), x in grid.items() if row == "image"] == [
            tuple(box) for box in view.image.boxes
        ]
    np.testing.assert_allclose(notes, expected, atol=0.0051)
    assert len(set(notes)) > 1


def test_tid_shows_the_mask_of_its_loss(tmp_path: Path, shapes: Shapes) -> None:
    """L_fea from the drawn M is the head's loss, and areas have the sizes of the paper."""
    zero = ("MODEL.DISTILL.TID.OUTSIDE_KEY", "zero")
    head, view, grid = prepare(tmp_path, shapes, "retinanet", ("TID",), *zero).look("TID")
    rows: dict[str, list[Any]] = {}
    for (row, _), panel in grid.items():
        rows.setdefault(row, []).append(panel.array.astype(np.float64))
    maps = head.maps(view.student, view.teacher)
    gaps = [(s - t).detach().double().square().mean(1)[0].numpy() for s, t in maps]
    total = sum((m * gap).sum() for m, gap in zip(rows["M"], gaps)) / sum(
        m.sum() for m in rows["M"]
    )
    loss = sum(head.losses(view.student, view.teacher).values())
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)
    key, weak = rows["key area: Score_key"], rows["weak area: Score_weak"]
    points = sum(x.size for x in key)
    assert sum((x > 0).sum() for x in key) == math.ceil(0.05 * points)
    assert set(np.concatenate([x.ravel() for x in weak])) == {1.0, 1.5}
    for score, k, m in zip(rows["Score_T"], key, rows["M"]):
        np.testing.assert_array_equal(k[k > 0], score[k > 0])
        assert (m[k == 0] == 0).all()


def test_figures_are_deterministic(tmp_path: Path, shapes: Shapes) -> None:
    run = prepare(tmp_path, shapes, "faster", ("MKD",))
    (_, _, one), (_, _, two) = run.look("MKD"), run.look("MKD")
    for key, panel in one.items():
        np.testing.assert_array_equal(panel.array, two[key].array)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visualize, "draw", lambda *args: args[-1].touch())


def test_student_and_adapters_are_loaded(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str], no_drawing: None
) -> None:
    """By default from OUTPUT_DIR; what the checkpoint lacks is said to be fresh."""
    run = prepare(tmp_path, shapes, "retinanet", ("MKD", "TID"))
    model, _ = visualize.build(run.cfg)
    trained = outspoken_model("retinanet", *EIGHT, seed=7).state_dict()
    state = {
        k: v + 1 if v is not None and v.is_floating_point() else v
        for k, v in model.heads.state_dict().items()
    }
    path = tmp_path / "output" / "model_final.pth"
    path.parent.mkdir()
    torch.save({"model": trained, "distill": state}, path)
    assert visualize.load_weights(model, run.cfg, "") == (str(path), [])
    for key, value in trained.items():
        torch.testing.assert_close(model.student.state_dict()[key], value)
    for key, value in model.heads.state_dict().items():
        if key.endswith(("weight", "bias")):
            torch.testing.assert_close(value, state[key])
    torch.save({"model": trained}, tmp_path / "plain.pth")
    assert run.main(weights="") == 0 and "fresh" not in capsys.readouterr().out
    assert run.main(weights=str(tmp_path / "plain.pth")) == 0
    assert capsys.readouterr().out.count("adapters: fresh") == 1  # TID's figure reads none


def test_an_image_of_no_data_set(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str], no_drawing: None
) -> None:
    path = tmp_path / "holiday photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    folders = [tmp_path / name for name in ("free", "bound")]
    opts = ("MODEL.DISTILL.IMA.SCOPE", "image")
    run = prepare(folders[0], shapes, "faster", ("MKD", "IMA", "FitNet"), *opts)
    assert run.main(str(path)) == 0
    names = {x.name for x in (folders[0] / "figures").iterdir()}
    assert names == {"holiday photo_mkd.png", "holiday photo_ima.png"}
    assert "FitNet has no figure" in capsys.readouterr().out
    run = prepare(folders[1], shapes, "faster", ("TID", "MKD"))
    message = run.fails(capsys, str(path))
    assert "6 images of shapes_tiny, whose ground-truth boxes TID shows" in message


def test_an_image_by_name_and_index(tmp_path: Path, shapes: Shapes) -> None:
    cfg = prepare(tmp_path, shapes, "faster", ("MKD",)).cfg
    entry = visualize.find_image(cfg, "3")
    path = Path(entry["file_name"])
    for name in (str(path), path.name, f"train/{path.name}", os.path.relpath(path)):
        assert visualize.find_image(cfg, name) == entry


@pytest.mark.slow
def test_one_sentence_says_what_is_wrong(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(tmp_path, shapes, "faster", ("MKD",))
    assert "--weights random" in run.fails(capsys, "0", "")
    assert "there is no file 'no.pth'" in run.fails(capsys, "0", "no.pth")
    assert "neither file name nor index of the 6 images" in run.fails(capsys, "6")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert "broken.jpg' cannot be read as an image" in run.fails(
        capsys, str(tmp_path / "broken.jpg")
    )
    student = outspoken_model("faster", *EIGHT).state_dict()
    state = {"MKD.adapters.p2.weight": torch.zeros(1)}
    torch.save({"model": student, "distill": state}, tmp_path / "other.pth")
    message = run.fails(capsys, "0", str(tmp_path / "other.pth"))
    assert "does not fit the config's MKD" in message and "adapters.p3.weight" in message
    run = prepare(tmp_path, shapes, "faster", ("FitNet",))
    assert "figures of MSSD, MKD, IMA, TID" in run.fails(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["()", "('mosaic', 'jitter', 'mixup')"])
def test_training_samples_are_drawn(
    steps: str, tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    """No teacher, head or checkpoint is needed."""
    config = write_config(trainable_cfg("mask", shapes, tmp_path), tmp_path / "config.yaml")
    own = ["INPUT.AUGMENT.STEPS", steps, "INPUT.AUGMENT.SIZE", "[64, 64]"]
    arguments = ["--samples", "3", "--iteration", "2", "--out", str(tmp_path), *own]
    assert cli.main(["visualize", "--config-file", str(config), *arguments]) == 0
    assert str(tmp_path / "samples.jpg") in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "samples.jpg"))
    assert sheet.std() > 10 and sheet.shape[0] < sheet.shape[1]


def test_samples_are_those_of_the_training(tmp_path: Path, shapes: Shapes) -> None:
    steps = ("INPUT.AUGMENT.STEPS", ("mosaic", "fit"), "INPUT.AUGMENT.SIZE", [64, 64])
    cfg = trainable_cfg("mask", shapes, tmp_path, *steps)
    found, later = training_samples(cfg, 6, 0), training_samples(cfg, 2, 2)
    assert len(found) == 6
    assert all(torch.equal(x["image"], y["image"]) for x, y in zip(found[4:], later))
    image = drawn(found[0], "BGR", ())
    assert image.shape == (64, 64, 3)
    instances = found[0].pop("instances")
    plain = drawn(found[0], "BGR", ())
    assert (plain == image).all() == (len(instances) == 0)
