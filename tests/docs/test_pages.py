"""Test the pages: their links, their names of configs, their examples, and the generated tables."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from distill import FPNDistillHead, cli
from distill.config import find_config, get_distill_cfg, merge_from_file
from distill.config.reference import KeyRow, head_rows
from distill.heads import DISTILL_HEAD_REGISTRY
from tests.docs.pages import DOCS, README, ROOT, TOP, blocks, commands

CONFIG = re.compile(r"(?<!output/)\b(?:[A-Z]\w+-[A-Z]\w+|Misc)/[\w./-]+\.yaml")
RECORDS = (  # they have old names, too
    *(ROOT / "docs" / x for x in ("results.md", "benchmarks.md")),
    ROOT / "CHANGELOG.md",
)
PAGES = [x for x in (*TOP, *DOCS) if x not in RECORDS]


def anchor(heading: str) -> str:
    """Return the fragment that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TOP, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """The strict build checks those of the other pages."""
    links = [x for x in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in x]
    for link in links:
        file, _, fragment = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), link


def test_named_configs_exist() -> None:
    names = {x for page in PAGES for x in CONFIG.findall(page.read_text())}
    zoo = {x for x in names if x.startswith("Misc/") or x.endswith("_3x.yaml")}
    assert len(names - zoo) > 25 and all(find_config(name) for name in names - zoo)


def test_named_files_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"\b(?:tools|projects|tests)/[\w/.-]+\.py", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_commands_have_valid_options() -> None:
    """Templates such as ``--config-file F``, too, which cannot run."""
    found = [x for page in PAGES for x in commands(page, "sh", "text") if x.program == "distill"]
    assert len(found) > 25
    for command in found:
        name, *arguments = command.arguments
        cli.command_parser(name)[1].parse_args([x.strip("[]") for x in arguments])


def test_yaml_examples_load(tmp_path: Path) -> None:
    found = [block for page in PAGES for block in blocks(page, "yaml")]
    assert len(found) > 8
    for k, block in enumerate(found):
        content = yaml.safe_load(block.text)
        content.pop("_BASE_", None)
        path = tmp_path / f"{k}.yaml"
        path.write_text(yaml.safe_dump(content))
        merge_from_file(get_distill_cfg(), str(path))


def test_the_example_of_a_section_builds() -> None:
    page = ROOT / "docs" / "tutorials" / "write-a-head.md"
    (example,) = (x.text for x in blocks(page, "python") if "Section(" in x.text)
    namespace: dict[str, type[FPNDistillHead]] = {}
    exec(example, namespace)
    section = namespace["Angle"].section
    assert section["WEIGHT"].default == 2.0 and section["MARGIN"].initial == -1


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 110


# ---- Generated tables.


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """docs/generate/methods.py, which needs no MkDocs."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "generate")
    import methods

    yield methods
    for name in ("methods", "text"):
        del sys.modules[name]


def test_the_data_file_names_registered_methods_only() -> None:
    data = yaml.safe_load((ROOT / "docs" / "generate" / "methods.yaml").read_text())
    assert set(data) <= {name for name, _ in DISTILL_HEAD_REGISTRY}
    assert {key for row in data.values() for key in row} <= {"formula", "needs", "learns", "paper"}


def test_a_method_without_an_entry_has_a_row(generate: ModuleType) -> None:
    matrix = generate.SupportMatrix({"RetinaNet": {"FCOS": {"FGD": ""}}}, {})
    page = "\n".join(generate.lines(matrix, data={}))
    assert "| [`FGD`](#fgd) | Compare objects and background apart" in page
    for name in DISTILL_HEAD_REGISTRY._obj_map:
        assert f"## {name}\n" in page and f"| [`{name}`](#{name.lower()}) |" in page


def test_the_authors_values_are_those_of_a_build(generate: ModuleType) -> None:
    """FGD's for FCOS, as its authors have them."""
    lines = list(generate.presets("FGD", head_rows()["FGD"], ["FCOS", "RetinaNet"]))
    assert lines[1] == "| key | RetinaNet | FCOS |"
    assert "| `MODEL.DISTILL.FGD.ALPHA` | `0.001` | `0.0016` |" in lines


def test_tables_escape_their_separator(generate: ModuleType) -> None:
    row = KeyRow("KEY", "a", "a | b", "meaning", {})
    assert "a \\| b" in "\n".join(generate.key_table([row]))
