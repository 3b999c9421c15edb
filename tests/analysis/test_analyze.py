"""The comparison of models: its numbers, its page, the images it chooses, and what it refuses."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from distill import cli
from distill.analysis import analyze
from distill.config import student_config
from distill.data.shapes import CLASSES
from distill.engine import evaluate
from distill.evaluation.coco_errors import CURVES
from tests.support.networks import outspoken_model, tiny_cfg, write_config
from tests.support.trainings import trainable_cfg

Shapes = tuple[str, str, str]
EIGHT = ("MODEL.ROI_HEADS.NUM_CLASSES", 8)
NINE = ("MODEL.ROI_HEADS.NUM_CLASSES", 9, "DATALOADER.NUM_WORKERS", 0)


class Page(HTMLParser):
    """The elements of a page, by tag."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def images(self) -> list[str]:
        keys = {"img": "src", "image": "href"}
        return [str(x[keys[tag]]) for tag, x in self.elements if tag in keys]


class Run:
    """The command on the shapes; predictions are made of their annotations."""

    def __init__(self, folder: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]):
        self.folder, self.shapes, self.capsys = folder, shapes, capsys
        self.out = folder / "out" / "report.html"
        self.content = json.loads(Path(shapes[1]).read_text())
        self.data = ["--annotations", shapes[1], "--images", shapes[2]]

    def __call__(self, *arguments: str, data: list[str] | None = None) -> int:
        data = self.data if data is None else data
        return cli.main(["analyze", *data, "--out", str(self.out), *arguments])

    def predictions(
        self, name: str, change: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda x: x
    ) -> list[str]:
        """Write every object as a detection, changed or left out; returns the option."""
        keys = ("image_id", "category_id", "bbox")
        found = [{k: x[k] for k in keys} | {"score": 0.9} for x in self.content["annotations"]]
        path = self.folder / f"{len(list(self.folder.iterdir()))}.json"
        path.write_text(json.dumps([y for x in found if (y := change(x))]))
        return ["--model", name, str(path)]

    def training(self, name: str, architecture: str = "faster", file: str = "student.yaml") -> Any:
        """Write an OUTPUT_DIR of random weights; returns the option and the config."""
        cfg = trainable_cfg(architecture, self.shapes, self.folder / name, *EIGHT)
        (self.folder / name).mkdir()
        write_config(student_config(cfg), self.folder / name / file)
        model = outspoken_model(architecture, *EIGHT)
        torch.save({"model": model.state_dict()}, self.folder / name / "model_final.pth")
        return ["--model", name, str(self.folder / name)], cfg

    def report(self) -> tuple[dict[str, Any], Page]:
        return json.loads(self.out.with_suffix(".json").read_text()), Page(self.out.read_text())

    def fails(self, *arguments: str, data: list[str] | None = None) -> str:
        """The one line on stderr."""
        self.capsys.readouterr()
        assert self(*arguments, data=data) == 2
        (line,) = self.capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and line.endswith(".")
        assert not self.out.parent.exists()
        return line


@pytest.fixture
def run(tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, shapes, capsys)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyze, "draw_curves", lambda *args: b"curves")


def next_class(detection: dict[str, Any]) -> dict[str, Any]:
    return {**detection, "category_id": detection["category_id"] % len(CLASSES) + 1}


def test_two_files(run: Run) -> None:
    perfect = run.predictions("ours & <b>yours</b>")
    confused = run.predictions("confused", next_class)
    assert run(*perfect, *confused, "--num-images", "2") == 0
    report, page = run.report()
    best, worst = report["models"].values()
    assert best["errors"] == pytest.approx(dict.fromkeys(CURVES, 100))
    assert best["metrics"]["AP"] == pytest.approx(100) and best["metrics"]["APl"] is None
    assert worst["errors"]["C50"] == 0 and worst["errors"]["FN"] == 100
    names = {x["category_id"] for x in run.content["annotations"]}
    defined = [x["C50"] is not None for x in best["errors_of_classes"]]
    assert defined == [k in names for k in range(1, len(CLASSES) + 1)]
    assert [x["f1"] for x in report["images"]] == [{"ours & <b>yours</b>": 1, "confused": 0}] * 2
    text = " ".join(page.texts)
    assert "Not known of ours & <b>yours</b>, confused: a file of predictions" in text
    assert "no supercategories, so Sim is Loc" in text
    assert "C75" in text and "AR100" in text and "circle" in text
    # The page needs no other file.
    text = run.out.read_text()
    assert "://" not in text and "url(" not in text
    assert {"script", "link", "iframe", "b"}.isdisjoint(tag for tag, _ in page.elements)
    assert len(page.images) == 3
    for source, kind in zip(page.images, ("png", "jpeg", "jpeg")):
        assert source.startswith(f"data:image/{kind};base64,") and len(source) > 1000
    assert not any(x.get("src", "data:")[:5] != "data:" for _, x in page.elements)


def test_images_are_those_on_which_the_models_differ(run: Run, no_drawing: None) -> None:
    """One model misses all of an image, and all but one of the fullest; a third misses none."""
    counts = {image["id"]: 0 for image in run.content["images"]}
    for x in run.content["annotations"]:
        counts[x["image_id"]] += 1
    most = max(counts, key=lambda k: (counts[k], -k))
    other = next(k for k in counts if k != most and counts[k] > 1)
    kept = next(x["bbox"] for x in run.content["annotations"] if x["image_id"] == most)

    def worse(x: dict[str, Any]) -> dict[str, Any] | None:
        missed = x["image_id"] == other or (x["image_id"] == most and x["bbox"] != kept)
        return None if missed else x

    models = run.predictions("a"), run.predictions("b", worse), run.predictions("c")
    for _ in range(2):
        assert run(*chain(*models)) == 0
        report, page = run.report()
        assert [x["id"] for x in report["images"]] == [other, most]
        f1 = 2 / (1 + counts[most])
        assert report["images"][1]["f1"] == pytest.approx({"a": 1, "b": f1, "c": 1})
    assert run(*models[0], *models[2]) == 0
    report, page = run.report()
    assert report["images"] == [] and "There is no such image" in " ".join(page.texts)
    # The image with more objects wins among equal differences. A low score counts as missed.
    faint = run.predictions("b", lambda x: {**x, "score": 0.3})
    assert run(*models[0], *faint, "--num-images", "1") == 0
    assert run.report()[0]["images"][0]["id"] == most
    assert run(*models[0], *faint, "--min-score", "0.3") == 0
    assert run.report()[0]["images"] == []


@pytest.mark.slow
def test_a_training_is_evaluated_as_training_does_and_measured(run: Run, no_drawing: None) -> None:
    option, cfg = run.training("trained")
    arguments = [*run.predictions("perfect"), *option]
    assert run(*arguments) == 0
    report, page = run.report()
    trained = report["models"]["trained"]
    cfg.DATASETS.TEST = (run.shapes[0],)
    expected = evaluate(cfg, str(run.folder / "trained" / "model_final.pth"))["bbox"]
    for key in ("AP", "AP50", "AP75", "APs"):
        assert trained["metrics"][key] == pytest.approx(expected[key])
    assert expected["AP"] > 0 and trained["metrics"]["APm"] is None
    cost = trained["efficiency"]
    model = outspoken_model("faster", *EIGHT)
    assert cost["parameters"] == sum(p.numel() for p in model.parameters()) / 1e6
    assert cost["input"] == "64 x 64" and cost["memory"] is None and cost["fps"] > 0
    text = " ".join(page.texts)
    assert "peak memory" in text and "Not known of perfect: a file" in text
    assert run(*option, "--size", "128x96", "--num-images", "0") == 0
    larger = run.report()[0]["models"]["trained"]
    assert larger["efficiency"]["input"] == "128 x 96"
    assert larger["efficiency"]["gflops"] > 1.5 * cost["gflops"] > 0
    assert larger["metrics"] == trained["metrics"]


def test_a_training_of_detectron2_itself(run: Run, no_drawing: None) -> None:
    """It has a config.yaml, which names a data set that is not there."""
    option, _ = run.training("stock", file="config.yaml")
    assert run(*option) == 0
    assert run.report()[0]["models"]["stock"]["efficiency"]["gflops"] > 0


@pytest.mark.slow
def test_a_registered_set_without_a_file(run: Run, no_drawing: None) -> None:
    name = f"dicts_{run.folder.name}"
    entries = []
    for image in run.content["images"]:
        own = [x for x in run.content["annotations"] if x["image_id"] == image["id"]]
        boxes = [
            {
                "bbox": x["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": x["category_id"] - 1,
            }
            for x in own
        ]
        path = str(Path(run.shapes[2]) / image["file_name"])
        size = {"height": image["height"], "width": image["width"]}
        entries.append({"file_name": path, "image_id": image["id"], "annotations": boxes, **size})
    DatasetCatalog.register(name, lambda: entries)
    MetadataCatalog.get(name).set(thing_classes=list(CLASSES))
    shifted = run.predictions("a", lambda x: {**x, "category_id": x["category_id"] - 1})
    option, _ = run.training("trained")
    assert run(*shifted, *option, data=["--dataset", name]) == 0
    report, page = run.report()
    assert report["models"]["a"]["metrics"]["AP"] == pytest.approx(100)
    assert report["data"]["name"] == name and len(page.images) == 1 + len(report["images"]) > 1
    assert run(*run.predictions("a"), *option) == 0  # the same images from the file
    from_file = run.report()[0]["models"]["trained"]["metrics"]
    assert report["models"]["trained"]["metrics"]["AP"] == pytest.approx(from_file["AP"])


def test_ids_may_be_any_numbers(run: Run, no_drawing: None) -> None:
    for k, x in enumerate(run.content["annotations"]):
        x["id"] = k  # pycocotools takes a match with 0 for none
    for x in (*run.content["images"], *run.content["annotations"]):
        key = "image_id" if "image_id" in x else "id"
        x[key] = float(x[key])
    path = run.folder / "floats.json"
    path.write_text(json.dumps(run.content))
    data = ["--annotations", str(path), "--images", run.shapes[2]]
    assert run(*run.predictions("all"), data=data) == 0
    found = run.report()[0]["models"]["all"]
    assert found["metrics"]["AP"] == found["errors"]["C75"] == pytest.approx(100)


def test_a_model_without_detections(run: Run, no_drawing: None) -> None:
    assert run(*run.predictions("none", lambda x: None), *run.predictions("all")) == 0
    nothing = run.report()[0]["models"]["none"]
    assert nothing["errors"] == dict(zip(CURVES, (0, 0, 0, 0, 0, 0, 100)))
    assert nothing["metrics"]["AP"] == nothing["metrics"]["AR100"] == 0


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown image": (lambda x: {**x, "image_id": 999}, "no image with image_id 999"),
    "unknown category": (lambda x: {**x, "category_id": 99}, "no category with category_id 99"),
    "masks": (lambda x: {"image_id": 1, "segmentation": {}}, "no bbox, only a segmentation"),
}


@pytest.mark.parametrize("case", WRONG)
def test_predictions_that_do_not_fit(case: str, run: Run) -> None:
    change, message = WRONG[case]
    line = run.fails(*run.predictions("good"), *run.predictions("bad", change))
    assert line.startswith("error: --model bad: ") and message in line


def test_one_sentence_says_what_is_wrong(run: Run) -> None:
    good = run.predictions("good")
    assert "give --model NAME PATH" in run.fails()
    assert "--model 'good' is given twice" in run.fails(*good, *good)
    assert "no file or folder" in run.fails("--model", "a", str(run.folder / "none.json"))
    own = good[-1].replace(".json", ".html")
    assert "would be overwritten" in run.fails(*good, "--out", own)
    assert "neither student.yaml nor config.yaml" in run.fails("--model", "a", str(run.folder))
    (run.folder / "half.json").write_text("[{")
    assert "are not valid JSON" in run.fails("--model", "a", str(run.folder / "half.json"))
    assert "either --dataset, or" in run.fails(*good, data=[])
    assert "either --dataset, or" in run.fails(*good, "--dataset", "coco_2017_val")
    line = run.fails(*good, data=["--dataset", "coco_2071_val"])
    assert "one of: coco_2017_val, " in line
    line = run.fails(*good, data=["--annotations", "none.json", "--images", run.shapes[2]])
    assert "there is no file 'none.json'" in line
    assert "number from 10" in run.fails(*good, "--max-detections", "5")
    assert "ends in .html" in run.fails(*good, "--out", str(run.folder / "out" / "report.json"))
    file = run.folder / "file"
    file.write_text("")
    line = run.fails(*good, "--out", str(file / "report.html"))
    assert "cannot be written" in line and file.read_text() == ""


@pytest.mark.slow
def test_the_classes_of_a_training_are_matched_by_name(run: Run, no_drawing: None) -> None:
    """The same detections give the same results if the file has its classes in another order."""
    option, cfg = run.training("trained")
    write_config(cfg, run.folder / "trained" / "config.yaml")
    assert run(*option) == 0
    expected = run.report()[0]["models"]["trained"]["metrics"]
    reverse = {x["id"]: 9 - x["id"] for x in run.content["categories"]}
    content = json.loads(json.dumps(run.content))
    for entries, key in (("categories", "id"), ("annotations", "category_id")):
        for entry in content[entries]:
            entry[key] = reverse[entry[key]]
    path = run.folder / "reversed.json"
    path.write_text(json.dumps(content))
    data = ["--annotations", str(path), "--images", run.shapes[2]]
    assert run(*option, data=data) == 0
    assert run.report()[0]["models"]["trained"]["metrics"] == expected
    assert expected["AR100"] > 0
    for category in content["categories"]:
        category["name"] += "s"
    data[1] = str(run.folder / "other.json")  # names of classes are kept for the whole process
    Path(data[1]).write_text(json.dumps(content))
    run.out = run.folder / "other" / "report.html"
    assert "none of the classes of the training, 'circle'" in run.fails(*option, data=data)


def test_networks_that_do_not_fit(run: Run) -> None:
    option, _ = run.training("trained")
    path = write_config(tiny_cfg("faster", *NINE), run.folder / "trained" / "student.yaml")
    assert "does not fit the GeneralizedRCNN of its config" in run.fails(*option)
    model = outspoken_model("faster", *NINE)
    torch.save({"model": model.state_dict()}, path.parent / "model_final.pth")
    line = run.fails(*option)
    assert "MODEL.ROI_HEADS.NUM_CLASSES of the training is 9" in line and "8 classes" in line
    with pytest.MonkeyPatch.context() as patch:  # all is read before the first network detects
        patch.setattr(analyze, "detect", lambda *args: pytest.fail("it detects"))
        line = run.fails(*option, "--model", "b", str(run.folder))
    assert "--model b: " in line and "neither student.yaml" in line
    (path.parent / "model_final.pth").unlink()
    assert "there is no file" in run.fails(*option)
    write_config(tiny_cfg("semantic", *NINE), path)
    torch.save({"model": outspoken_model("semantic").state_dict()}, path.parent / "model_final.pth")
    assert "SemanticSegmentor detects no boxes" in run.fails(*option)


def test_data_that_cannot_be_evaluated(run: Run) -> None:
    good = run.predictions("good")
    for change, message in (
        (lambda c: c["annotations"].clear(), "no objects to find"),
        (lambda c: [x.update(image_id=9_999) for x in c["annotations"]], "has no objects to find"),
        (lambda c: c["annotations"][0].update(iscrowd=None), "iscrowd is None"),
        (lambda c: c["images"][0].update(file_name="../../x.jpg"), "out of the folder"),
    ):
        content = json.loads(Path(run.shapes[1]).read_text())
        change(content)
        path = run.folder / f"{len(message)}.json"
        path.write_text(json.dumps(content))
        data = ["--annotations", str(path), "--images", run.shapes[2]]
        assert message in run.fails(*good, data=data)
