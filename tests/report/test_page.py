"""Test the report: what it shows, which images it chooses, and that it escapes every text."""

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill import cli
from distill.data.shapes import CLASSES
from distill.report import install
from distill.report.charts import MOST_POINTS, Line, line_chart
from distill.report.detections import spread
from tests.support.runs import BAD, write_run, write_teacher

Shapes = tuple[str, str, str]
pytest.importorskip("plotly")


class Page(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += f"{data} "

    def all(self, tag: str, **wanted: str) -> list[dict[str, Any]]:
        found = [x for name, x in self.elements if name == tag]
        return [x for x in found if wanted.items() <= x.items()]

    @property
    def charts(self) -> list[str]:
        """Descriptions of the charts."""
        return [x["aria-label"] for x in self.all("div", **{"class": "plot"})]


def report(folders: Sequence[Path], *options: str) -> Page:
    out = folders[0].parent / "page.html"
    assert cli.main(["report", *map(str, folders), "--out", str(out), *options]) == 0
    return Page(out)


def without_first(shapes: Shapes) -> Any:
    """Return a change that leaves out the detections of the first image."""
    first = json.loads(Path(shapes[1]).read_text())["images"][0]["id"]
    return lambda x: None if x["image_id"] == first else x


def next_class(x: dict[str, Any]) -> dict[str, Any]:
    return {**x, "category_id": x["category_id"] % len(CLASSES) + 1}


@pytest.mark.slow
def test_a_run_and_its_baseline(tmp_path: Path, shapes: Shapes) -> None:
    base = write_run(tmp_path / "base", shapes, 10, change=without_first(shapes))
    run = write_run(tmp_path / "new", shapes, 12, heads=("fitnet",))
    write_teacher(run, shapes, next_class)
    page = report([base, run])
    assert "new has 51.0 box AP, 2.0 more than base (49.0) after 40 of 40 iterations." in page.text
    titles = [x.split(". ")[0] for x in page.charts]
    assert titles == [
        *("box AP, %", "loss_cls", "loss", "ratio to the task", "cosine to the task's gradient"),
        *("learning rate", "Change of the AP of each class", "Errors of boxes"),
    ]
    overlaid = "base: 29.0 at iteration 19 to 49.0 at iteration 39; new: 31.0 at iteration 19 to"
    assert overlaid in page.charts[0]
    assert "p2: 2 at iteration 19" in page.charts[2] and "p3: 0.1" in page.charts[3]
    assert "new: circle 2, square 2" in page.charts[6]
    assert "right at IoU 0.75 100.0" in page.charts[7].split("new: ")[1]
    assert "right at IoU 0.75 100.0" not in page.charts[7].split("new: ")[0]
    # Only the first image has changed. The teacher confuses the classes in all.
    panels = [x["aria-label"] for x in page.all("svg", role="img")]
    assert len(page.all("image")) == 1 + 4 and len(panels) == 4 * 5
    assert "base: F1 0.00: 0 right, 0 wrong" in panels[1] and "new: F1 1.00" in panels[2]
    assert panels[4 + 3].startswith("teacher: F1 0.00: 0 right") and "0 wrong" not in panels[7]
    assert {x["href"] for x in page.all("use")} == {f"#{x['id']}" for x in page.all("image")}
    for text in ("MODEL.DISTILL.HEADS", "['fitnet']", "sys.platform", "Twice", "(2 times)"):
        assert text in page.text
    assert "0.500" in page.text and "10%" in page.text and "time over the first" in page.text


def test_one_run(tmp_path: Path, shapes: Shapes) -> None:
    page = report([write_run(tmp_path / "new", shapes, change=without_first(shapes))])
    assert "AP of each class. new: circle 49.0, square 10.0" in page.charts[3]
    assert "Images with most errors" in page.text and len(page.all("image")) == 1
    assert "where it is not the default" in page.text and "SOLVER.MAX_ITER" in page.text
    assert "distill prove" not in page.text  # one training is not compared with another


@pytest.mark.slow
def test_masks(tmp_path: Path, shapes: Shapes) -> None:
    change = without_first(shapes)
    run = write_run(tmp_path / "new", shapes, change=change, masks=True)
    page = report([run])
    assert [x.split(". ")[0] for x in page.charts[-2:]] == ["Errors of boxes", "Errors of masks"]
    outlines = [x["d"] for x in page.all("path")]
    assert len(outlines) > 1 and all(x.startswith("M") and x.endswith("Z") for x in outlines)
    write_teacher(run, shapes, next_class)  # it has boxes only
    assert report([run]).all("path") == []


@pytest.mark.slow
def test_three_runs(tmp_path: Path, shapes: Shapes) -> None:
    folders = [write_run(tmp_path / x, shapes, k, heads=("at",)) for k, x in enumerate("abc")]
    page = report(folders)
    assert "c is the best of 3 runs: 41.0 box AP, 2.0 more than a (39.0)." in page.text
    assert "Comparison of 3 runs" in page.text and "There is no such image." in page.text
    assert [x for x in ("a", "b", "c") if f"Distillation by at of {x}" in page.text] == [*"abc"]


@pytest.mark.slow
def test_what_is_missing_is_said(tmp_path: Path, shapes: Shapes) -> None:
    run = write_run(tmp_path / "new", shapes, change=lambda x: None)
    assert "missed 100.0" in report([run]).charts[-1]  # no detection at all
    other = write_run(tmp_path / "other", shapes, change=lambda x: {**x, "image_id": 999})
    page = report([run, other])
    assert "Left out: other: " in page.text and "no image with image_id 999" in page.text
    for images in ("[999]", "[{}]", "3"):
        (run / "report_teacher.json").write_text(f'{{"images": {images}, "results": []}}')
        assert "teacher" not in report([run]).text.partition("Images of the test set")[2]
    (run / "config.yaml").unlink()
    (run / "log.txt").unlink()
    page = report([run])
    assert "new has no config.yaml; give --annotations and --images." in page.text
    assert "The log has no environment." in page.text and "no warnings" in page.text
    page = report([run], "--annotations", shapes[1], "--images", str(tmp_path))
    assert "missed 100.0" in page.charts[-1]
    assert "cannot be read as an image" in page.text and "No images are shown." in page.text


def test_every_text_is_escaped(tmp_path: Path, shapes: Shapes) -> None:
    """Names of classes, images, heads and runs come from others, and so do warnings."""
    content = json.loads(Path(shapes[1]).read_text())
    content["categories"][0]["name"] = BAD
    images = tmp_path / "images"
    images.mkdir()
    for k, image in enumerate(content["images"]):
        old, image["file_name"] = image["file_name"], f"{k}<script>alert(1)<&quot;.png"
        Image.open(Path(shapes[2]) / old).save(images / image["file_name"])
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps(content))
    own = ("escaped", str(annotations), str(images))
    # A slash would be another folder.
    name = BAD.replace("/", "")
    run = write_run(
        tmp_path / name, own, heads=(BAD.replace("/", ""),), name=BAD, change=next_class
    )
    page = report([run], "--annotations", own[1], "--images", own[2])
    assert BAD in page.text and "0<script>alert(1)<&quot;.png" in page.text
    scripts = len(page.all("script"))
    assert scripts == 2 + len(page.charts)  # the library, the drawing, and one for each chart
    assert "<script>alert" not in page.source and not page.all("b")
    ids = [x["id"] for _, x in page.elements if "id" in x]
    assert len(set(ids)) == len(ids) and all(x.replace("-", "").isalnum() for x in ids)


def test_the_page_needs_no_other_file(tmp_path: Path, shapes: Shapes) -> None:
    page = report([write_run(tmp_path / "new", shapes)])
    addresses = [x.get("src", x.get("href", "#")) for _, x in page.elements]
    assert all(x.startswith(("data:image/", "#")) for x in addresses)
    assert not page.all("link") and len(page.source) < 8e6
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")
    # Names for a screen reader, and the keyboard reaches what scrolls.
    assert all(x.get("aria-label") for x in page.all("div", role="img"))
    assert all(x["tabindex"] == "0" for x in page.all("div", role="region"))
    assert len(page.all("caption")) == len(page.all("table"))
    headings = [x["aria-labelledby"] for x in page.all("section")]
    assert headings == [x["id"] for x in page.all("h2")]


WRONG = [
    (["{none}"], "has no metrics.json; name the OUTPUT_DIR of a training"),
    (["{run}", "{run}"], "A RUN is given twice"),
    (["{run}", "--annotations", "a.json"], "Give both --annotations and --images"),
    (["{run}", "--annotations", "a.json", "--images", "."], "there is no file 'a.json'"),
    (["{run}", "--out", "{run}/page.txt"], "must be a file that ends in .html"),
    (["{run}", "--out", "{run}/log.txt/page.html"], "cannot be written"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_one_sentence_says_what_is_wrong(
    tmp_path: Path,
    shapes: Shapes,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    run = write_run(tmp_path / "new", shapes)
    arguments = [x.format(run=run, none=tmp_path) for x in arguments]
    assert cli.main(["report", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_without_plotly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    assert cli.main(["report", str(tmp_path)]) == 2
    line = "error: Install plotly for the report: pip install plotly.\n"
    assert capsys.readouterr().err == line


def test_long_lines_are_thinned_to_their_ends() -> None:
    values = {k: float(k % 7) for k in range(10_000)}
    chart = line_chart("a", "x", [Line("x", values, "red")])
    assert chart.html.count(",") < 3 * MOST_POINTS and "9999" in chart.html
    assert [row[0] for row in chart.table.rows][::9] == [0, 9999] and len(chart.table.rows) == 10
    one = line_chart("a", "x", [Line("x", {5: 2.0}, "red")])
    assert one.description == "x: 2 at iteration 5" and '"lines+markers"' in one.html


def test_spread() -> None:
    assert spread(range(10), 3) == [0, 3, 6] and spread([4], 3) == [4] and spread([], 3) == []
