"""Test that weights are read strictly, and that no content of a file is executed."""

import contextlib
import os
import pickle
import re
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torch import Tensor, nn

from distill.checkpoint.load import SafeCheckpointer, load_strictly, readable
from distill.config import get_distill_cfg, merge_from_file, student_config
from distill.errors import CheckpointError, WeightsError
from distill.utils.io import file_hash
from tests.support.pickles import CALLS, PICKLES, Call, touch, toy, zipped

ROOT = Path(__file__).resolve().parents[2]


def arrays(fill: float = 7.0) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in toy(fill).state_dict().items()}


def loaded(path: Path | str, **kw: Any) -> Tensor:
    """Return the weight of :func:`toy` after a strict loading."""
    model = toy()
    load_strictly(model, str(path), "MODEL.WEIGHTS", **kw)
    return model.weight.detach()


def refused(path: Path | str, allow_pickle: bool = True) -> str:
    """Return the one-line message of the error."""
    with pytest.raises(WeightsError) as caught:
        loaded(path, allow_pickle=allow_pickle)
    message = str(caught.value)
    assert message.startswith("MODEL.WEIGHTS: ") and "\n" not in message and len(message) < 700
    return message


# ---- Formats.

LAYOUTS: dict[str, Callable[[], Any]] = {
    "detectron2's zoo": lambda: {"model": arrays(), "__author__": "Detectron2 Model Zoo"},
    "ordered": lambda: OrderedDict(model=OrderedDict(arrays()), __author__="somebody"),
    "to match": lambda: {"model": arrays(), "__author__": "me", "matching_heuristics": True},
    "with more beside": lambda: {
        **{"model": arrays(), "__author__": "somebody", "iteration": np.int64(9)},
        **{"lr": np.float32(0.5), "history": [(1, "a"), None, b"b", 2.5, {"c": True}]},
    },
}


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"], ids=["numpy1", "numpy2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pickle_of_arrays(
    name: str, core: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_of = pickle.whichmodule  # type: ignore[attr-defined]
    renamed = lambda *args: module_of(*args).replace("numpy._core", core)  # noqa: E731
    monkeypatch.setattr(pickle, "whichmodule", renamed)
    data = pickle._dumps(LAYOUTS[name](), protocol)  # type: ignore[attr-defined]
    assert core.encode() in data
    (tmp_path / "w.pkl").write_bytes(data)
    assert loaded(tmp_path / "w.pkl", allow_pickle=True).eq(7).all()


def test_caffe2s_two_layouts(tmp_path: Path) -> None:
    """The blobs are below a key, as in detectors, or not; Caffe2's names become detectron2's."""
    blobs = {"res2_0_branch2a_w": np.full((2, 2, 1, 1), 7, "f4"), "lr_momentum": np.ones(3, "f4")}
    for content in (blobs, {"blobs": blobs, "cfg": "MODEL: {}"}):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, 2))
        stage = nn.ModuleDict({"0": nn.ModuleDict({"conv1": nn.Conv2d(2, 2, 1, bias=False)})})
        model = nn.ModuleDict({"res2": stage})
        load_strictly(model, str(tmp_path / "w.pkl"), "MODEL.WEIGHTS", allow_pickle=True)
        assert model.state_dict()["res2.0.conv1.weight"].eq(7).all()


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """In such a file, as those of Detectron, strings and numbers are bytes."""
    sevens = "".join(f"\\x{b:02x}" for b in np.float32(7).tobytes())

    def array(shape: tuple[int, ...]) -> str:
        empty = "cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        dtype = "cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        dims = "".join(f"I{n}\n" for n in shape)
        return f"{empty}(I1\n({dims}t{dtype}I00\nS'{sevens * int(np.prod(shape))}'\ntb"

    model = f"(dS'weight'\n{array((2, 3))}sS'bias'\n{array((2,))}s"
    data = f"(dS'model'\n{model}sS'__author__'\nS'somebody'\ns.".encode()
    assert pickle.loads(data, encoding="latin1")["model"]["weight"].shape == (2, 3)
    (tmp_path / "w.pkl").write_bytes(data)
    assert loaded(tmp_path / "w.pkl", allow_pickle=True).eq(7).all()


@pytest.mark.parametrize("protocol", [2, 5])
def test_every_kind_of_array_arrives_as_it_was(protocol: int, tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    expected = {
        "float64": g.normal(size=(3, 4)),
        "float16": g.normal(size=(2, 2)).astype("f2"),
        "big endian": g.normal(size=(3, 4)).astype(">f4"),
        "fortran": np.asfortranarray(g.normal(size=(2, 3, 4)).astype("f4")),
        "strided": g.normal(size=(4, 6)).astype("f4")[::2, 1::2],
        "integer": g.integers(0, 99, (5,)),
        "bool": np.array([True, False]),
        "nothing": np.zeros((0, 3), "f4"),
        "a number": np.array(3, "i8"),
    }
    model = nn.Module()
    for name, array in expected.items():
        model.register_buffer(name, torch.zeros(array.shape, dtype=torch.float64))
    content = {"model": expected, "__author__": "somebody"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol))
    load_strictly(model, str(tmp_path / "w.pkl"), "MODEL.WEIGHTS", allow_pickle=True)
    for name, array in expected.items():
        np.testing.assert_array_equal(getattr(model, name).numpy(), array.astype("f8"), name)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "pyth"])
def test_torchs_formats(suffix: str, zipped: bool, tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": toy(7).state_dict(), "iteration": 3}
    if suffix == "pyth":  # the format of pycls
        state = {**toy(7).state_dict(), "num_batches_tracked": torch.tensor(3)}
        content = {"model_state": state, "epoch": 3}
    torch.save(content, tmp_path / f"w.{suffix}", _use_new_zipfile_serialization=zipped)
    assert loaded(tmp_path / f"w.{suffix}").eq(7).all()


def test_a_bare_state_dict(tmp_path: Path) -> None:
    torch.save(toy(7).state_dict(), tmp_path / "w.pth")
    assert loaded(tmp_path / "w.pth").eq(7).all()


def test_a_checkpointer_reads_again_after_an_error(tmp_path: Path) -> None:
    torch.save({"model": toy(7).state_dict()}, tmp_path / "w.pth")
    (tmp_path / "broken.pth").write_bytes(b"broken")
    checkpointer = SafeCheckpointer(model := toy())
    broken = str(tmp_path / "broken.pth")
    with pytest.raises(WeightsError), readable(broken, "--resume"):
        checkpointer.load(broken)
    checkpointer.load(str(tmp_path / "w.pth"))
    assert model.weight.eq(7).all()


def test_other_errors_of_ours_pass_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    with (
        pytest.raises(CheckpointError, match=r"^the disk is full\.$"),
        readable(str(tmp_path / "w.pth"), "--resume"),
    ):
        raise CheckpointError("the disk is full.")


def test_the_recipe_for_resnet_18(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program in the comment of Base-R-18.yaml creates all weights of the backbone."""
    config = ROOT / "configs" / "Base-R-18.yaml"
    recipe = re.search(r"<<'END'\n(.*)#   END\n", config.read_text(), re.DOTALL)
    assert recipe is not None
    torchvisions = torchvision.models.resnet18().state_dict()
    for value in torchvisions.values():
        value.copy_(torch.randn(value.shape) * 9)
    downloads: list[Any] = []

    def download(url: str, **kw: Any) -> dict[str, Tensor]:
        downloads.append((url, kw))
        return torchvisions

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.chdir(tmp_path)
    program = re.sub(r"^#   ", "", recipe[1], flags=re.MULTILINE)
    exec(compile(program, str(config), "exec"), {})
    ((url, options),) = downloads
    assert url.startswith("https://") and options == {"check_hash": True, "weights_only": True}

    cfg = get_distill_cfg()
    merge_from_file(cfg, str(config))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2"]
    model = build_model(student_config(cfg)).backbone
    load_strictly(model, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    found = model.state_dict()
    assert found["stem.conv1.norm.running_var"].equal(torchvisions["bn1.running_var"])
    assert found["res4.0.shortcut.weight"].equal(torchvisions["layer3.0.downsample.0.weight"])
    assert found["res5.1.conv2.norm.bias"].equal(torchvisions["layer4.1.bn2.bias"])


# ---- Nothing is executed.


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_works_where_pickles_are_executed(name: str, tmp_path: Path) -> None:
    """Without this, the tests below could not fail."""
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError):  # after the execution
        pickle.loads(PICKLES[name](tmp_path / "marker"))
    assert (tmp_path / "marker").exists()


def test_a_forged_zip_is_read(tmp_path: Path) -> None:
    torch.save({"model": toy(7).state_dict()}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        (name,) = [x for x in archive.namelist() if x.endswith("data.pkl")]
        data = archive.read(name)
    zipped(data, tmp_path / "forged.pth")
    assert loaded(tmp_path / "forged.pth").eq(7).all()


@pytest.mark.parametrize("name", PICKLES)
def test_no_file_is_executed(name: str, tmp_path: Path) -> None:
    data = PICKLES[name](tmp_path / "marker")
    for file in ("w.pkl", "w.pth", "w.pyth", "w.PKL", "w"):
        (tmp_path / file).write_bytes(data)
        assert "cannot be read" in refused(tmp_path / file)
    zipped(data, tmp_path / "zip.pth")
    assert "cannot be read" in refused(tmp_path / "zip.pth")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_no_object_next_to_the_weights_is_executed(name: str, legacy: bool, tmp_path: Path) -> None:
    call = CALLS[name](tmp_path / "marker")
    content = {"model": toy(7).state_dict(), "model_state": toy(7).state_dict(), "x": call}
    for file in ("w.pth", "w.pyth"):
        torch.save(content, tmp_path / file, _use_new_zipfile_serialization=not legacy)
        assert "it calls" in refused(tmp_path / file)
    content = {"model": {**arrays(), "x": call}, "__author__": "somebody"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    assert "it calls" in refused(tmp_path / "w.pkl")
    assert not (tmp_path / "marker").exists()


def test_the_error_names_the_function(tmp_path: Path) -> None:
    for file in ("w.pkl", "w.pth", "w.pyth"):
        (tmp_path / file).write_bytes(PICKLES["os.system"](tmp_path / "marker"))
        message = refused(tmp_path / file)
        assert "it calls posix.system" in message and "weights_only" not in message


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\x01.",  # a name of the registry of extensions
        b"Psystem\n.",  # a persistent name
        b"\x80\x02ccollections\nCounter\n.",
        b"\x80\x02c__builtin__\nset\n.",
    ],
)
def test_no_other_name_is_looked_up(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(data)
    refused(tmp_path / "w.pkl")


OBJECTS = np.array([{"a": 1}], dtype=object)
RECORDS = np.zeros(2, [("a", "O"), ("b", "f4")])


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "array",
    [OBJECTS, RECORDS, np.array(["text"]), np.zeros(2, "c8"), np.zeros(2, "M8[s]")],
    ids=["objects", "records", "text", "complex", "dates"],
)
def test_arrays_are_of_numbers(array: np.ndarray, protocol: int, tmp_path: Path) -> None:
    """NumPy would use the bytes of an object array as pointers."""
    content = {"model": {**arrays(), "x": array}, "__author__": "somebody"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol))
    assert "dtype" in refused(tmp_path / "w.pkl")


def test_numpys_own_functions_are_out_of_reach(tmp_path: Path) -> None:
    """Bytes of an object array, and of a dtype that hides its objects, are pointers to anywhere."""
    denying = (3, "|", None, ("a",), {"a": (np.dtype(object), 0)}, 8, 1, 0)
    dtype = pickle.loads(pickle.dumps(np.dtype([("a", "f8")])))
    dtype.__setstate__(denying)
    assert dtype["a"].hasobject and not dtype.hasobject  # NumPy believes it
    for call in (
        Call(np.ndarray, (2, 3), np.dtype("f4"), b"\x41" * 24),
        Call(np.ndarray, (2, 3), np.dtype(object), b"\x41" * 48),
        Call(np.dtype, "V8", False, True),
        Call(np.frombuffer, b"\x41" * 24, "f4"),
    ):
        content = {"model": {"weight": call, "bias": np.ones(2)}, "__author__": "somebody"}
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
        refused(tmp_path / "w.pkl")


# ---- Damaged files, and files of another content.


WHOLE: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.ones(3),
    "a list": lambda: [torch.ones(3)],
    "a list of names": lambda: ["model", "__author__"],
    "a number": lambda: 3,
    "a text": lambda: "model",
    "nothing": lambda: None,
    "an empty dictionary": dict,
}
MODELS: dict[str, Callable[[], Any]] = {
    "no weights": dict,
    "a number": lambda: 3,
    "a list": lambda: [torch.ones(3)],
    "a tensor": lambda: torch.ones(2, 3),
    "a number for a tensor": lambda: {"weight": 3.0, "bias": torch.ones(2)},
    "a list for a tensor": lambda: {"weight": [1.0, 2.0], "bias": torch.ones(2)},
    "a text for a tensor": lambda: {"weight": "x", "bias": torch.ones(2)},
    "a dictionary for a tensor": lambda: {"weight": {"x": torch.ones(2, 3)}},
    "a number for a name": lambda: {**toy(7).state_dict(), 3: torch.ones(3)},
    "a tuple for a name": lambda: {**toy(7).state_dict(), ("a",): torch.ones(3)},
}
TENSORS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.ones(2, 3).to_sparse(),
    "compressed": lambda: torch.ones(2, 3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 3), 1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(3)]),
    "complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "without values": lambda: torch.ones(2, 3, device="meta"),
    "without an end": lambda: torch.ones(1).expand(2**30, 2**30),
}


def as_arrays(content: Any) -> Any:
    """Convert tensors to arrays, for a pickle."""
    if isinstance(content, dict):
        return {k: as_arrays(v) for k, v in content.items()}
    return content.numpy() if isinstance(content, Tensor) else content


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("suffix", ["pth", "pyth", "pkl"])
def test_a_file_of_something_else(name: str, suffix: str, tmp_path: Path) -> None:
    content = WHOLE[name]()
    if suffix == "pkl":
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(as_arrays(content)))
    else:
        torch.save(content, tmp_path / f"w.{suffix}")
    refused(tmp_path / f"w.{suffix}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("suffix", ["pth", "pyth", "pkl"])
def test_a_model_of_something_else(name: str, suffix: str, tmp_path: Path) -> None:
    key = "model_state" if suffix == "pyth" else "model"
    content = {key: MODELS[name](), "__author__": "somebody"}
    if suffix == "pkl":
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(as_arrays(content)))
    else:
        torch.save(content, tmp_path / f"w.{suffix}")
    refused(tmp_path / f"w.{suffix}")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # beta features
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_another_kind(name: str, tmp_path: Path) -> None:
    torch.save({"model": {**toy(7).state_dict(), "weight": TENSORS[name]()}}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pth", "pyth", "pkl"])
def test_a_deep_nest(suffix: str, tmp_path: Path) -> None:
    nest = b"]" * 100_000 + b"a" * 99_999  # a list in a list in ...
    for data in (nest + b".", b"}X\x05\x00\x00\x00model" + nest + b"s."):
        (tmp_path / f"w.{suffix}").write_bytes(data)
        refused(tmp_path / f"w.{suffix}")
        zipped(data, tmp_path / "zip.pth")
        refused(tmp_path / "zip.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pkl"])
def test_a_damaged_file(kind: str, tmp_path: Path) -> None:
    """Loading a cut file or a file with wrong bytes gives the weights or one sentence."""
    path = tmp_path / ("w.pkl" if kind == "pkl" else "w.pth")
    if kind == "pkl":
        path.write_bytes(pickle.dumps({"model": arrays(), "__author__": "somebody"}, 2))
    else:
        content = {"model": toy(7).state_dict(), "iteration": 3}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    data, g = path.read_bytes(), np.random.default_rng(0)
    refusals = 0
    for trial in range(300):
        damaged = bytearray(data)
        if trial % 3 == 0:
            damaged = damaged[: g.integers(len(data))]
        else:
            for position in g.integers(len(data), size=g.integers(1, 4)):
                damaged[position] = g.integers(256)
        path.write_bytes(damaged)
        try:
            loaded(path, allow_pickle=True)
        except WeightsError as e:
            refusals += 1
            assert str(e).startswith("MODEL.WEIGHTS: ")
    assert refusals > 100


# ---- Sources of files.


class Catalogue:
    """detectron2's cache, with files that appear to be downloaded.

    Args:
        cache: folder of the cache.
        name: folder of the files in the catalogue. Each test needs its own, because detectron2
            remembers the files that it has found.
    """

    def __init__(self, cache: Path, name: str):
        self.folder = cache / "detectron2" / name
        self.folder.mkdir(parents=True)
        self.url = f"detectron2://{name}"

    def write(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    return Catalogue(tmp_path, tmp_path.name)


def zoo_file(fill: float = 7.0) -> bytes:
    return pickle.dumps({"model": arrays(fill), "__author__": "Detectron2 Model Zoo"}, 2)


def named(data: bytes, folder: Path) -> str:
    """Return the name that detectron2's zoo would give the file."""
    (folder / "unnamed").write_bytes(data)
    return f"model_final_{file_hash(str(folder / 'unnamed'), 'md5')[:6]}.pkl"


def test_a_file_of_the_zoo_has_the_hash_of_its_name(catalogue: Catalogue, tmp_path: Path) -> None:
    name = named(zoo_file(), tmp_path)
    file = catalogue.write(name, zoo_file())
    assert loaded(f"{catalogue.url}/{name}").eq(7).all()
    assert not list(catalogue.folder.glob("*.sha256"))
    file.write_bytes(zoo_file(fill=8))
    message = refused(f"{catalogue.url}/{name}", allow_pickle=False)
    assert f"does not have the md5 {name[12:18]}" in message and f"'{file}'" in message
    assert "delete it" in message


def test_a_file_without_a_name_for_its_hash_is_pinned(catalogue: Catalogue) -> None:
    file = catalogue.write("R-50.pkl", zoo_file()[:-99])
    pin = catalogue.folder / "R-50.pkl.sha256"
    refused(f"{catalogue.url}/R-50.pkl", allow_pickle=False)
    assert not pin.exists()  # the hash of an unreadable file must not be kept
    file.write_bytes(zoo_file())
    for _ in range(2):
        assert loaded(f"{catalogue.url}/R-50.pkl").eq(7).all()
    checked = subprocess.run(["sha256sum", "--check", pin], cwd=catalogue.folder)
    assert checked.returncode == 0
    file.write_bytes(zoo_file(fill=8))
    message = refused(f"{catalogue.url}/R-50.pkl", allow_pickle=False)
    assert "does not have the sha256" in message and str(pin) in message
    assert "delete both" in message
    pin.unlink()
    assert loaded(f"{catalogue.url}/R-50.pkl").eq(8).all()


def test_a_hash_that_cannot_be_kept_is_only_a_warning(
    catalogue: Catalogue, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue.write("R-50.pkl", zoo_file())
    (catalogue.folder / "R-50.pkl.sha256").mkdir()
    assert loaded(f"{catalogue.url}/R-50.pkl").eq(7).all()
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    "url, file",
    [
        ("https://dl.fbaipublicfiles.com/detectron2/{}/a.pkl", "detectron2/{}/a.pkl"),
        ("https://dl.fbaipublicfiles.com/detectron/{}/a.pkl", "detectron/{}/a.pkl"),
        ("catalog://ImageNetPretrained/FAIR/R-50-GN", "detectron/ImageNetPretrained/47261647/"),
    ],
)
def test_the_catalogue_by_other_names(
    url: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    path = tmp_path / file.format(tmp_path.name)
    path = path if path.suffix else path / "R-50-GN.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(zoo_file())
    assert loaded(url.format(tmp_path.name)).eq(7).all()
    assert path.with_name(f"{path.name}.sha256").is_file()


def test_a_malicious_file_of_the_catalogue_is_not_executed_either(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    data = pickle.dumps(Call(os.system, touch(tmp_path / "marker")))
    name = named(data, tmp_path)
    catalogue.write(name, data)
    assert "it calls posix.system" in refused(f"{catalogue.url}/{name}", allow_pickle=False)
    assert not (tmp_path / "marker").exists()


def test_another_pickle_needs_the_switch(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(zoo_file())
    line = refused(tmp_path / "w.pkl", allow_pickle=False)
    assert "add 'MODEL.ALLOW_PICKLE True' to the command" in line
    assert loaded(tmp_path / "w.pkl", allow_pickle=True).eq(7).all()
    assert not (tmp_path / "w.pkl.sha256").exists()  # a user's file may change


@pytest.mark.parametrize(
    "url, words",
    [
        ("https://example.com/w.pkl", "MODEL.ALLOW_PICKLE"),
        ("https://example.com/w.pkl?matching_heuristics=True", "MODEL.ALLOW_PICKLE"),
        ("https://dl.fbaipublicfiles.com.example.com/detectron2/w.pkl", "MODEL.ALLOW_PICKLE"),
        ("https://dl.fbaipublicfiles.com/other/w.pkl", "MODEL.ALLOW_PICKLE"),
        ("http://dl.fbaipublicfiles.com/detectron2/w.pkl", "https://"),
        ("http://example.com/w.pth", "https://"),
        ("ftp://example.com/w.pth", "https://"),
        ("https://example.com/../../home/w.pth", "'..'"),
        ("detectron2://../../home/w.pkl", "'..'"),
    ],
)
def test_a_url_that_is_not_downloaded(
    url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*args: Any, **kw: Any) -> None:
        pytest.fail("it was fetched")

    monkeypatch.setattr("iopath.common.file_io.download", fetch)
    assert words in refused(url, allow_pickle=False)
