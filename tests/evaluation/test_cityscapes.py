"""Test the evaluators that run Cityscapes' own scripts with detectron2's contract."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import trainId2label
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator as StockInstanceEvaluator
from detectron2.evaluation import CityscapesSemSegEvaluator as StockSemanticEvaluator
from detectron2.structures import Instances
from numpy.typing import NDArray

from distill.data.cityscapes import LABEL_IDS, TRAIN_IDS, load_cityscapes_semantic, train_id_table
from distill.data.shapes import SceneConfig, write_cityscapes
from distill.engine import Trainer, evaluate
from distill.errors import DataError
from distill.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from tests.support.networks import tiny_cfg
from tests.support.trainings import assert_declared

K = 19
needs_in1d = pytest.mark.skipif(not hasattr(np, "in1d"), reason="so do detectron2's evaluators")
LAYOUT = {"image_dir": "leftImg8bit", "gt_dir": "gtFine"}


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Register a split of three images; some of their pixels are void."""
    root = tmp_path_factory.mktemp("cityscapes")
    write_cityscapes(root, "val", 3, config=SceneConfig(height=96, width=128))
    for place, path in enumerate(sorted((root / "gtFine").rglob(f"*{LABEL_IDS}"))):
        for kind in ("labelIds", "instanceIds"):
            file = str(path).replace("labelIds", kind)
            image = cv2.imread(file, -1)
            image[:, : 20 + place] = 3 * place  # unlabeled, out of roi, ground
            image[40:44, 40:60] = 5  # dynamic
            cv2.imwrite(file, image)
    metadata = MetadataCatalog.get(f"cityscapes_{root.name}")
    metadata.set(
        image_dir=str(root / "leftImg8bit" / "val"),
        gt_dir=str(root / "gtFine" / "val"),
        thing_classes=MetadataCatalog.get("cityscapes_fine_instance_seg_val").thing_classes,
    )
    return metadata.name


def image_dicts(name: str) -> list[dict[str, Any]]:
    metadata = MetadataCatalog.get(name)
    return load_cityscapes_semantic(metadata.image_dir, metadata.gt_dir)


def truth(image_dict: dict[str, Any], kind: str = "labelIds") -> NDArray[Any]:
    stem = image_dict["sem_seg_file_name"].rpartition("_")[0]
    return cv2.imread(f"{stem}_{kind}.png", -1)


def run(evaluator: Any, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> Any:
    evaluator.reset()
    for one, output in zip(inputs, outputs):
        evaluator.process([one], [output])
    return evaluator.evaluate()


def logits(labels: NDArray[Any], classes: int = K) -> dict[str, torch.Tensor]:
    """Return an output whose argmax is ``labels``; ignored pixels become class 0."""
    known = torch.from_numpy(np.where(labels < classes, labels, 0)).long()
    return {"sem_seg": torch.nn.functional.one_hot(known, classes).permute(2, 0, 1).float()}


def numpy_iou(pairs: list[tuple[NDArray[Any], NDArray[Any]]]) -> NDArray[np.float64]:
    """Return (K,) IoU in percent, pixel by pixel; NaN for classes that are absent."""
    counts = np.zeros((K, K), dtype=np.int64)
    for predicted, wanted in pairs:
        valid = wanted != 255
        np.add.at(counts, (wanted[valid].astype(int), predicted[valid].astype(int)), 1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return 100 * counts.diagonal() / np.where(union > 0, union, np.nan)


def noisy(labels: NDArray[Any], seed: int) -> NDArray[Any]:
    """Return labels with a third wrong, including classes that the ground truth lacks."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(labels.shape) < 1 / 3
    return np.where(wrong | (labels == 255), rng.integers(0, K - 1, labels.shape), labels)


# ------------------------------------------------------------------------------------- semantic


def test_iou_is_that_of_numpy(name: str, tmp_path: Path) -> None:
    inputs = image_dicts(name)
    wanted = [train_id_table()[truth(x)] for x in inputs]
    predicted = [noisy(labels, seed) for seed, labels in enumerate(wanted)]
    outputs = [logits(labels) for labels in predicted]
    results = run(CityscapesSemanticEvaluator(name, str(tmp_path)), inputs, outputs)["sem_seg"]

    iou = numpy_iou(list(zip(predicted, wanted)))
    present = np.isin(np.arange(K), np.concatenate([x.ravel() for x in wanted]))
    assert 0 < present.sum() < (~np.isnan(iou)).sum() < K  # some are predicted but absent
    assert results["IoU"] == pytest.approx(np.nanmean(iou), abs=1e-6)
    assert results["mIoU_present"] == pytest.approx(iou[present].mean(), abs=1e-6)
    assert results["mIoU_present"] > results["IoU"]
    classes = {k: v for k, v in results.items() if k.startswith("IoU-")}
    expected = {f"IoU-{trainId2label[i].name}": x for i, x in enumerate(iou) if not np.isnan(x)}
    assert classes == pytest.approx(expected, abs=1e-6)
    assert json.loads(json.dumps(results, allow_nan=False)) == results


@needs_in1d
def test_semantic_metrics_of_detectron2(name: str, tmp_path: Path) -> None:
    inputs = image_dicts(name)
    outputs = [logits(noisy(train_id_table()[truth(x)], 7)) for x in inputs]
    stock = run(StockSemanticEvaluator(name), inputs, outputs)["sem_seg"]
    ours = run(CityscapesSemanticEvaluator(name, str(tmp_path)), inputs, outputs)["sem_seg"]
    assert stock == {k: ours[k] for k in stock}


def test_perfect_labels(name: str, tmp_path: Path) -> None:
    inputs = image_dicts(name)
    outputs = [logits(train_id_table()[truth(x)]) for x in inputs]
    results = run(CityscapesSemanticEvaluator(name, str(tmp_path)), inputs, outputs)["sem_seg"]
    assert all(x == pytest.approx(100) for x in results.values())


def test_files_of_labels_stay(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files hold label ids and have the script's names; a second evaluation replaces them."""
    monkeypatch.chdir(tmp_path)
    inputs = image_dicts(name)
    outputs = [logits(train_id_table()[truth(x)]) for x in inputs]
    evaluator = CityscapesSemanticEvaluator(name, "inference")
    Path("inference", name, "predictions").mkdir(parents=True)
    Path("inference", name, "predictions", "old.png").touch()
    run(evaluator, inputs, outputs)
    assert os.listdir() == ["inference"]
    folder = Path("inference", name)
    assert {x.name for x in folder.iterdir()} == {
        "predictions",
        "resultPixelLevelSemanticLabeling.json",
    }
    stems = [Path(x["file_name"]).stem for x in inputs]
    assert sorted(x.name for x in (folder / "predictions").iterdir()) == [
        f"{stem}_pred.png" for stem in stems
    ]
    written = cv2.imread(str(folder / "predictions" / f"{stems[0]}_pred.png"), -1)
    valid = train_id_table()[truth(inputs[0])] != 255
    assert (written[valid] == truth(inputs[0])[valid]).all()


def test_more_classes_than_the_benchmark(name: str, tmp_path: Path) -> None:
    """A network with detectron2's 54 default classes gives wrong labels, but no error."""
    inputs = image_dicts(name)
    outputs = []
    for one in inputs:
        labels = train_id_table()[truth(one)].astype(int)
        labels[0] = 53
        outputs.append(logits(labels, 54))
    results = run(CityscapesSemanticEvaluator(name, str(tmp_path)), inputs, outputs)["sem_seg"]
    assert 90 < results["IoU"] < 100


def test_a_missing_prediction(name: str, tmp_path: Path) -> None:
    inputs = image_dicts(name)
    outputs = [logits(train_id_table()[truth(x)]) for x in inputs]
    with pytest.raises(DataError, match=r"lacks 1 of 3 predictions.*OUTPUT_DIR"):
        run(CityscapesSemanticEvaluator(name, str(tmp_path)), inputs[1:], outputs[1:])


def test_the_script_does_not_end_the_process(name: str, tmp_path: Path) -> None:
    inputs = image_dicts(name)
    outputs = [logits(train_id_table()[truth(x)][1:]) for x in inputs]
    with pytest.raises(DataError, match=r"script stopped: ERROR: Image heights"):
        run(CityscapesSemanticEvaluator(name, str(tmp_path)), inputs, outputs)


def test_numpy_without_in1d(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = image_dicts(name)
    semantic = [logits(train_id_table()[truth(x)]) for x in inputs]
    monkeypatch.delattr(np, "in1d", raising=False)
    evaluator = CityscapesSemanticEvaluator(name, str(tmp_path))
    assert run(evaluator, inputs, semantic)["sem_seg"]["IoU"] == pytest.approx(100)
    masks = CityscapesInstanceEvaluator(name, str(tmp_path))
    assert run(masks, inputs, [instances(x) for x in inputs])["segm"]["AP"] == pytest.approx(100)
    assert not hasattr(np, "in1d")


# ------------------------------------------------------------------------------------ instances


def instances(image_dict: dict[str, Any], masks: Any = None) -> dict[str, Instances]:
    """Return the ground truth as an output, with other masks if given."""
    ids = truth(image_dict, "instanceIds")
    things = [x for x in np.unique(ids).tolist() if x >= 1000]
    order = [24, 25, 26, 27, 28, 31, 32, 33]
    output = Instances(ids.shape)
    if masks is None:
        masks = torch.from_numpy(np.stack([ids == x for x in things]))
    output.pred_masks = masks
    output.pred_classes = torch.tensor([order.index(x // 1000) for x in things])
    output.scores = torch.linspace(0.9, 0.5, len(things))
    return {"instances": output}


def one_car(size: int) -> dict[str, Instances]:
    output = Instances((size, size))
    output.pred_masks = torch.ones(1, size, size, dtype=torch.bool)
    output.pred_classes, output.scores = torch.tensor([2]), torch.ones(1)
    return {"instances": output}


def test_perfect_masks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = image_dicts(name)
    outputs = [instances(x) for x in inputs]
    results = run(CityscapesInstanceEvaluator(name, "inference"), inputs, outputs)["segm"]
    assert {"AP", "AP50"} < set(results)
    assert all(x == pytest.approx(100) for x in results.values())
    assert os.listdir() == ["inference"]  # no matches.json
    folder = Path("inference", name)
    assert (folder / "resultInstanceLevelSemanticLabeling.json").is_file()
    stem = Path(inputs[0]["file_name"]).stem
    lines = (folder / "predictions" / f"{stem}_pred.txt").read_text().splitlines()
    assert len(lines) == len(outputs[0]["instances"])
    png, label, score = lines[0].split()
    mask = cv2.imread(str(folder / "predictions" / png), -1) > 0
    assert (mask == outputs[0]["instances"].pred_masks[0].numpy()).all()
    assert int(label) >= 24 and float(score) == pytest.approx(0.9)


@needs_in1d
def test_instance_metrics_of_detectron2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the script writes matches.json
    inputs = image_dicts(name)
    outputs = []
    for one in inputs:
        masks = instances(one)["instances"].pred_masks
        outputs.append(instances(one, masks.roll((1, 2), (1, 2))))
    stock = run(StockInstanceEvaluator(name), inputs, outputs)["segm"]
    ours = run(CityscapesInstanceEvaluator(name, "inference"), inputs, outputs)["segm"]
    assert stock == pytest.approx({k: ours[k] for k in stock})
    assert 0 < ours["AP"] < 100


def test_nothing_found(name: str, tmp_path: Path) -> None:
    inputs = image_dicts(name)
    empty = {"instances": instances(inputs[0])["instances"][:0]}
    evaluator = CityscapesInstanceEvaluator(name, str(tmp_path))
    assert run(evaluator, inputs, [empty] * 3)["segm"]["AP"] == 0


def test_a_split_without_labels(tmp_path: Path) -> None:
    """For a split such as test, only the predictions are written."""
    write_cityscapes(tmp_path, "test", 1, config=SceneConfig(height=64, width=64))
    for path in (tmp_path / "gtFine").rglob("*Ids.png"):
        cv2.imwrite(str(path), cv2.imread(str(path), -1) * 0 + 3)
    folders = {k: str(tmp_path / v / "test") for k, v in LAYOUT.items()}
    classes = MetadataCatalog.get("cityscapes_fine_instance_seg_val").thing_classes
    MetadataCatalog.get(str(tmp_path)).set(**folders, thing_classes=classes)
    (one,) = load_cityscapes_semantic(**folders)
    output = {**logits(np.zeros((64, 64), int)), **one_car(64)}
    for kind in (CityscapesSemanticEvaluator, CityscapesInstanceEvaluator):
        for results in run(kind(str(tmp_path), str(tmp_path)), [one], [output]).values():
            assert np.isnan([*results.values()]).all()


@pytest.mark.parametrize("kind", [CityscapesSemanticEvaluator, CityscapesInstanceEvaluator])
def test_only_the_first_process_scores(
    kind: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = kind(name, str(tmp_path))
    evaluator.reset()
    monkeypatch.setattr("distill.evaluation.cityscapes.comm.is_main_process", lambda: False)
    shutil.rmtree(tmp_path / name)
    assert evaluator.evaluate() == {}


# ---------------------------------------------------------------------------------- end to end


@pytest.mark.e2e
@pytest.mark.parametrize("windows", [False, True])
def test_the_download_is_enough(windows: bool, tmp_path: Path) -> None:
    """Train without files of train ids. --eval-only finds the same IoU as the training."""
    root = tmp_path / "cityscapes"
    write_cityscapes(root, "train", 2, config=SceneConfig(height=96, width=192))
    for path in (root / "gtFine").rglob(f"*{TRAIN_IDS}"):
        path.unlink()
    folders = str(root / "leftImg8bit" / "train"), str(root / "gtFine" / "train")
    name = f"download_{tmp_path}".replace("/", "_")
    DatasetCatalog.register(name, lambda: load_cityscapes_semantic(*folders))
    MetadataCatalog.get(name).set(
        image_dir=folders[0], gt_dir=folders[1], evaluator_type="cityscapes_sem_seg"
    )
    cfg = tiny_cfg(
        "semantic",
        *("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0),
        *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", K, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 3),
        *("INPUT.MIN_SIZE_TRAIN", (64, 96), "INPUT.MIN_SIZE_TEST", 96),
        *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [64, 128]),
        *("TEST.SLIDING_WINDOW.ENABLED", windows, "TEST.SLIDING_WINDOW.CROP_SIZE", [64, 128]),
        *("TEST.SLIDING_WINDOW.STRIDE", [32, 64], "OUTPUT_DIR", str(tmp_path / "out")),
        norm="BN",
    )
    torch.manual_seed(0)  # with some seeds no class is found
    trainer = Trainer(cfg)
    trainer.train()
    logged = trainer.storage.latest()
    results = evaluate(cfg, str(tmp_path / "out" / "model_final.pth"))
    assert_declared(cfg, results)
    again = results["sem_seg"]
    assert again == pytest.approx({k: logged[f"sem_seg/{k}"][0] for k in again}, nan_ok=True)
    assert again["mIoU_present"] > 0
    predictions = tmp_path / "out" / "inference" / name / "predictions"
    assert len(list(predictions.iterdir())) == 2
