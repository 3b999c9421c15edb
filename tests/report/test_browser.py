"""Test the report in Chromium: it draws, loads nothing, fits narrow windows, and opens quickly.

It needs ``pip install playwright`` and a Chromium that is installed already.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import cli
from tests.support.runs import BAD, write_run, write_teacher

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("plotly")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
Shapes = tuple[str, str, str]
IMAGES = """async () => {
  const all = [...document.querySelectorAll("image")].map((x) => x.getAttribute("href"));
  const load = (href) => Object.assign(new Image(), {src: href}).decode().then(() => true);
  return Promise.all(all.map((href) => load(href).catch(() => false)));
}"""
UNNAMED = """() => [...document.querySelectorAll("[role=img], [role=region], nav, section")]
  .filter((x) => !x.ariaLabel && !document.getElementById(x.getAttribute("aria-labelledby")))
  .length"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium
        opened = chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_it_draws_and_loads_nothing(
    tmp_path: Path, shapes: Shapes, browser: Any, width: int
) -> None:
    base = write_run(tmp_path / "base", shapes, 10, change=lambda x: None)
    run = write_run(tmp_path / "new", shapes, 12, heads=("fitnet",), name=BAD)
    write_teacher(run, shapes, lambda x: None)
    assert cli.main(["report", str(base), str(run)]) == 0
    page = browser.new_page(viewport={"width": width, "height": 900})
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    own = ("file:", "data:", "blob:")
    page.on("request", lambda x: x.url.startswith(own) or faults.append(x.url))
    page.goto((run / "report.html").as_uri())
    plots = page.locator(".plot").count()
    assert 0 < page.locator(".plot template").count() < plots  # far charts are not drawn yet
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    drawn = page.locator(".plot .cartesianlayer .subplot")
    drawn.nth(plots - 1).wait_for(state="attached")
    assert drawn.count() == plots and page.locator(".plot template").count() == 0
    assert page.locator(".plot .scatterlayer .js-line").count() > 9  # curves
    assert page.locator(".plot .barlayer path").count() > 9
    assert BAD in page.locator(".plot").filter(has_text="alert").first.inner_text()
    assert page.evaluate(IMAGES) == [True] * 8
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(UNNAMED) == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details table").first.is_visible()
    assert faults == []
    page.close()
