"""Configs, weights and names come from strangers: none of them makes a command run code."""

import ast
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.cases import for_each
from tests.support.onnx_files import write_onnx
from tests.support.pickles import PICKLES, zipped
from tests.support.trainings import Run

ROOT = Path(__file__).resolve().parents[1]
Shapes = tuple[str, str, str]


@pytest.fixture
def run(tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, shapes, capsys)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Return the file that executed code would create."""
    return tmp_path / "executed"


# ---- Weights.

ALLOWED = ("MODEL.ALLOW_PICKLE", "True")
FILES: dict[str, Callable[[bytes, Path], object]] = {
    "w.pkl": lambda data, path: path.write_bytes(data),
    "w.pth": zipped,
    "legacy.pth": lambda data, path: path.write_bytes(data),
    "w.pyth": lambda data, path: path.write_bytes(data),
}
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "the student's": ("MODEL.WEIGHTS", []),
    "the teacher's": ("MODEL.DISTILL.TEACHER.WEIGHTS", []),
    "to evaluate": ("MODEL.WEIGHTS", ["--eval-only"]),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_malicious_weights(command: str, file: str, run: Run, marker: Path) -> None:
    key, options = COMMANDS[command]
    FILES[file](PICKLES["os.system"](marker), run.folder / file)
    switch = ALLOWED if file == "w.pkl" else ()
    line = run.fails(*options, key, str(run.folder / file), *switch)
    assert key in line and file in line and "it calls posix.system" in line
    assert not marker.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pickle_needs_the_switch(command: str, run: Run, marker: Path) -> None:
    key, options = COMMANDS[command]
    (run.folder / "w.pkl").write_bytes(PICKLES["os.system"](marker))
    line = run.fails(*options, key, str(run.folder / "w.pkl"))
    assert key in line and "MODEL.ALLOW_PICKLE" in line and not marker.exists()


@pytest.mark.parametrize(
    "name, form",
    [
        ("model_0000003.pth", "w.pth"),
        ("model_0000003.pth", "legacy.pth"),
        ("model_final.pth", "w.pth"),
        ("other.pkl", "w.pkl"),
    ],
)
def test_a_malicious_checkpoint_to_resume_from(
    name: str, form: str, run: Run, marker: Path
) -> None:
    """Also one that only the note of the last checkpoint names."""
    run.output.mkdir()
    FILES[form](PICKLES["os.system"](marker), run.output / name)
    (run.output / "last_checkpoint").write_text(name)
    assert run("--resume", *ALLOWED) == 2
    (line,) = run.capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "--resume" in line and not marker.exists()


# ---- ONNX files.


def as_teacher(path: Path) -> list[str]:
    """Overrides that name a teacher without a file of weights."""
    key = "MODEL.DISTILL.TEACHER"
    return [f"{key}.CONFIG_FILE", str(path), f"{key}.WEIGHTS", ""]


@for_each("name", PICKLES)
def test_a_pickle_is_no_onnx_file(name: str, run: Run, marker: Path) -> None:
    path = run.folder / "teacher.onnx"
    path.write_bytes(PICKLES[name](marker))
    line = run.fails(*as_teacher(path))
    assert "MODEL.DISTILL.TEACHER.CONFIG_FILE" in line and "teacher.onnx" in line
    assert not marker.exists()


@for_each("place", ["/etc/hostname", "../secret.bin", "a/../../secret.bin"])
def test_an_onnx_file_reads_nothing_outside_of_its_folder(place: str, run: Run) -> None:
    folder = run.folder / "teacher"
    folder.mkdir(exist_ok=True)
    (run.folder / "secret.bin").write_bytes(bytes(2**20))
    path = write_onnx(folder / "teacher.onnx", external=place)
    opts = ("MODEL.DISTILL.TEACHER.OPTS", "['MODEL.ONNX.LEVELS', [['fine', 8]]]")
    line = run.fails(*as_teacher(path), *opts)
    assert f"names data outside of its folder: '{place}'" in line


# ---- Configs.

DOCUMENTS: dict[str, str] = {
    "apply": "SEED: !!python/object/apply:os.system ['touch {marker}']",
    "apply with names": "SEED: !!python/object/apply:os.system "
    "{{kwds: {{command: touch {marker}}}}}",
    "module": "SEED: !!python/module:evil_module",
    "name": "SEED: !!python/name:evil_module.system",
    "object": "SEED: !!python/object:evil_module.Evil {{}}",
    "new": "SEED: !!python/object/new:type {{args: [x, !!python/tuple [], {{extend: "
    "!!python/name:exec }}], listitems: \"open('{marker}', 'w')\"}}",
    "deep inside": "MODEL: {{RESNETS: {{NORM: [{{a: !!python/object/apply:os.system "
    "['touch {marker}']}}]}}}}",
    "a key": "? !!python/object/apply:os.system ['touch {marker}']\n: 1",
    "another tag": "%TAG !p! tag:yaml.org,2002:python/\n---\n"
    "SEED: !p!object/apply:os.system ['touch {marker}']",
    "the zoo's expression and more": "MODEL: {{ANCHOR_GENERATOR: {{SIZES: "
    '!!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] '
    "for x in [32, 64, 128, 256, 512 ]] + [open('{marker}', 'w')]\"]}}}}",
}
PLACES = ("base", "teacher", "teacher's base")


@pytest.fixture
def document(request: pytest.FixtureRequest, marker: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of :data:`DOCUMENTS`, with the module that some of them import."""
    (marker.parent / "evil_module.py").write_text(
        f"from os import system\nsystem('touch {marker}')\nclass Evil: pass\n"
    )
    monkeypatch.syspath_prepend(marker.parent)
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    return DOCUMENTS[request.param].format(marker=marker)


@pytest.mark.parametrize("document", DOCUMENTS, indirect=True)
def test_a_document_works_where_yaml_is_executed(document: str, marker: Path) -> None:
    """So that the test below could fail."""
    with contextlib.suppress(yaml.YAMLError, TypeError):  # afterwards
        yaml.unsafe_load(document)
    assert marker.exists()


@pytest.mark.parametrize(
    "document, place",
    [
        *((name, "config") for name in DOCUMENTS),
        *((name, place) for name in ("module", "new") for place in PLACES),
    ],
    indirect=["document"],
)
def test_a_malicious_config(document: str, place: str, run: Run, marker: Path) -> None:
    teachers = "teacher" in place
    file = run.folder / "teacher.yaml" if teachers else run.config
    if "base" in place:
        (run.folder / "inner.yaml").write_text(document)
        (run.folder / "middle.yaml").write_text("_BASE_: [inner.yaml]\nSEED: 1\n")
        file.write_text("_BASE_: middle.yaml\n" + file.read_text())
    else:
        file.write_text(document)
    line = run.fails()
    assert file.name in line and "safe yaml" in line
    assert not marker.exists()


@pytest.mark.parametrize("teachers", [False, True], ids=["config", "teacher"])
def test_a_config_is_no_program(teachers: bool, run: Run, marker: Path) -> None:
    """detectron2's lazy configs are Python files."""
    program = run.folder / "config.py"
    program.write_text(f"open({str(marker)!r}, 'w')\n")
    opts = ["MODEL.DISTILL.TEACHER.CONFIG_FILE", str(program)] if teachers else []
    run.config = run.config if teachers else program
    line = run.fails(*opts)
    if teachers:
        assert f"LazyConfig '{program}' runs code" in line and "MODEL.ALLOW_CODE True" in line
    else:
        assert f"Config file '{program}' is a Python LazyConfig, which only a teacher" in line
    assert not marker.exists()


def test_a_yaml_cannot_allow_code(run: Run, marker: Path) -> None:
    program = run.folder / "config.py"
    program.write_text(f"open({str(marker)!r}, 'w')\n")
    values = yaml.safe_load(run.config.read_text())
    values["MODEL"]["ALLOW_CODE"] = True
    values["MODEL"]["DISTILL"]["TEACHER"]["CONFIG_FILE"] = str(program)
    run.config.write_text(yaml.safe_dump(values))
    assert "MODEL.ALLOW_CODE is True in" in run.fails()
    assert not marker.exists()


@pytest.mark.parametrize("place", ["config", *PLACES])
def test_a_file_gives_no_permission(place: str, run: Run) -> None:
    """A stranger's file must not decide what this machine reads."""
    teachers = "teacher" in place
    file = run.folder / "teacher.yaml" if teachers else run.config
    values = yaml.safe_load(file.read_text())
    base = run.folder / "base.yaml"
    base.write_text("MODEL: {ALLOW_PICKLE: True}")
    if "base" in place:
        values["_BASE_"] = str(base)
    else:
        values["MODEL"]["ALLOW_PICKLE"] = True
    file.write_text(yaml.safe_dump(values))
    line = run.fails("MODEL.WEIGHTS", str(run.folder / "missing.pkl"))
    assert line == (
        f"error: MODEL.ALLOW_PICKLE is True in {file}, but it counts only on the command line; "
        "remove it there, or add 'MODEL.ALLOW_PICKLE True' to the command."
    )
    # The user may still give it, for example to repeat a run with its own config.yaml.
    missing = run.fails("MODEL.WEIGHTS", str(run.folder / "missing.pkl"), *ALLOWED)
    assert "there is no file" in missing


VALUES = {
    "a call": "__import__('os').system('touch {marker}')",
    "a call in a tuple": "(__import__('os').system('touch {marker}'),)",
    "a comprehension": "[open('{marker}', 'w') for _ in [0]]",
    "a tag": "!!python/object/apply:os.system ['touch {marker}']",
}
KEYS = {
    "a number": ["SEED", "{value}"],
    "a name": ["MODEL.BACKBONE.NAME", "{value}"],
    "heads": ["MODEL.DISTILL.HEADS", "{value}"],
    "sets": ["DATASETS.TRAIN", "{value}"],
    "annotations": ["DATASETS.COCO_FORMAT", "{value}"],
    "a triple": ["DATASETS.COCO_FORMAT", "(('a', {quoted}, '.'),)"],
    "a triple's name": ["DATASETS.COCO_FORMAT", "(({quoted}, 'a.json', '.'),)"],
    "a data.yaml": ["DATASETS.YOLO_FORMAT", "(('a', {quoted}, 'train'),)"],
    "the teacher's number": ["MODEL.DISTILL.TEACHER.OPTS", "['SEED', {quoted}]"],
    "the teacher's name": ["MODEL.DISTILL.TEACHER.OPTS", "['MODEL.BACKBONE.NAME', {quoted}]"],
}


@pytest.mark.parametrize("name", [x for x in VALUES if x != "a tag"])
def test_a_value_works_where_it_is_executed(name: str, marker: Path) -> None:
    """So that the test below could fail."""
    eval(VALUES[name].format(marker=marker))
    assert marker.exists()


@pytest.mark.parametrize("key", KEYS)
def test_malicious_values(key: str, run: Run, marker: Path) -> None:
    for form in VALUES.values():
        value = form.format(marker=marker)
        run.fails(*(x.format(value=value, quoted=repr(value)) for x in KEYS[key]))
        assert not marker.exists(), value


def test_malicious_proposals(run: Run, shapes: Shapes, marker: Path) -> None:
    """detectron2 reads precomputed proposals from pickles."""
    (run.folder / "proposals.pkl").write_bytes(PICKLES["os.system"](marker))
    files = str((str(run.folder / "proposals.pkl"),))
    opts = ["MODEL.LOAD_PROPOSALS", "True", "MODEL.WEIGHTS", str(run.teacher)]
    opts += ["DATASETS.PROPOSAL_FILES_TRAIN", files, "DATASETS.PROPOSAL_FILES_TEST", files]
    sets = ["DATASETS.TEST", str((shapes[0],))]
    for options in ([], ["--eval-only"]):
        assert "MODEL.LOAD_PROPOSALS" in run.fails(*options, *opts, *sets)
        assert not marker.exists()


# ---- The source.


EXECUTING = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"),
    *("DetectionCheckpointer", "LazyConfig.load", "model_zoo.get", "model_zoo.get_config"),
}


def dangers(source: str) -> list[str]:
    """Calls that can execute what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve"):
            found.append(f"from {node.module} import")
        if isinstance(node, ast.Call) and _dangerous(node):
            found.append(ast.unparse(node))
    return found


def _dangerous(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    module, _, function = name.rpartition(".")
    given = {x.arg: ast.unparse(x.value) for x in call.keywords}
    if name in EXECUTING:
        return True
    if module in ("pickle", "cloudpickle", "dill", "joblib", "marshal"):
        return function in ("load", "loads", "Unpickler")
    if name in ("torch.load", "torch.hub.load_state_dict_from_url"):
        return given.get("weights_only") != "True"
    if module == "yaml" and "load" in function:
        loader = [*given.values(), *map(ast.unparse, call.args[1:])]
        return function != "safe_load" and not {"yaml.SafeLoader", "yaml.CSafeLoader"} & {*loader}
    if function == "exec_module":
        return True
    if function == "load_yaml_with_base":
        return given.get("allow_unsafe") != "False"
    if function == "merge_from_file":  # a config's own, which is unsafe in detectron2
        return bool(module)
    if name in ("np.load", "numpy.load"):
        return given.get("allow_pickle", "False") != "False"
    return given.get("shell", "False") != "False"


@pytest.mark.parametrize(
    "source",
    [
        "eval(cfg.KEY)",
        "exec(text)",
        "pickle.load(f)",
        "pickle.Unpickler(f).load()",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.hub.load('a/b', 'c')",
        "torch.hub.load_state_dict_from_url(url)",
        "yaml.load(f)",
        "yaml.load(f, Loader=yaml.Loader)",
        "yaml.load(f, yaml.UnsafeLoader)",
        "yaml.unsafe_load(f)",
        "yaml.full_load(f)",
        "cfg.merge_from_file(path)",
        "CfgNode.load_yaml_with_base(path)",
        "CfgNode.load_yaml_with_base(path, allow_unsafe=True)",
        "LazyConfig.load(path)",
        "spec.loader.exec_module(module)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "DetectionCheckpointer(model).load(path)",
    ],
)
def test_a_danger_is_seen(source: str) -> None:
    assert dangers(source)


def test_what_is_safe_is_let_through() -> None:
    assert not dangers(
        "model.eval(); re.compile('a'); torch.compile(model); json.load(f); yaml.safe_load(f)\n"
        "torch.load(path, 'cpu', weights_only=True); merge_from_file(cfg, path); np.load(path)\n"
        "yaml.load(f, Loader=yaml.SafeLoader); ast.literal_eval(x); subprocess.run(['a'])\n"
        "CfgNode.load_yaml_with_base(path, allow_unsafe=False); SafeCheckpointer(model).load(x)"
    )


SOURCES = [p for folder in ("projects", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]


PERMITTED = {  # after MODEL.ALLOW_CODE, or for files of detectron2's own
    "lazy.py": ["LazyConfig.load(path)"],
    "module.py": ["spec.loader.exec_module(module)"],
}


@for_each("path", SOURCES)
def test_nothing_that_is_read_is_executed(path: Path) -> None:
    permitted = PERMITTED.get(path.name, []) if path.parent.name == "nets" else []
    assert dangers(path.read_text(encoding="utf-8")) == permitted
