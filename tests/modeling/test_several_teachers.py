"""Several teachers give the losses that each gives alone, and wrong sections are refused."""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor

from distill import DistillModel, cli
from distill.analysis import visualize
from distill.config import one_per_teacher, teacher_config, validate_config
from distill.config.resume import changed_values, takes_effect, training_values
from distill.data.shapes.scenes import CLASSES
from distill.doctor import examine
from distill.doctor.replay import _networks
from distill.engine.health import ratio_warning
from distill.engine.teacher_outputs import classes_on
from distill.errors import ConfigError, DistillError
from distill.experiments import prove
from distill.experiments.paired import NetworkPair, method_config
from tests.support.networks import (
    distill_opts,
    image_dict,
    network_info,
    tiny_cfg,
    tiny_model,
    write_config,
)
from tests.support.trainings import (
    Interrupted,
    Interruption,
    Shapes,
    differences,
    train,
    trainable_cfg,
    write_teacher,
)

HEADS = {"faster": ("FitNet", "ROIKD"), "retinanet": ("IMA", "DenseKD")}
KNOWN = {"vehicles": ("class 0", "class 2"), "persons": ("class 1",)}
OTHERS = {"vehicles": CLASSES[:3], "persons": CLASSES[3:6]}  # disjoint parts of the rendered shapes
KEY = "MODEL.DISTILL.TEACHERS"

Sections = list[dict[str, Any]]


def sections(
    folder: Path, family: str, known: dict[str, tuple[str, ...]] = KNOWN, **kw: Any
) -> Sections:
    """Write tiny teachers, each of its own classes and width; return their sections."""
    found = []
    for k, (name, classes) in enumerate(known.items()):
        number = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")
        opts = [x for key in number for x in (key, len(classes))]
        _, file, _, weights = write_teacher(folder / name, family, *opts, fpn=16 + 8 * k)
        own = {"NAME": name, "CONFIG_FILE": file, "WEIGHTS": weights, "CLASSES": list(classes)}
        found.append({**own, **kw})
    return found


def config(
    family: str, teachers: Sections, *opts: Any, heads: tuple[str, ...] | None = None
) -> CfgNode:
    return tiny_cfg(family, *distill_opts(family, heads or HEADS[family]), KEY, teachers, *opts)


def alone(cfg: CfgNode, section: dict[str, Any]) -> CfgNode:
    """Return the config with one of its teachers as the only one."""
    cfg = cfg.clone()
    cfg.MODEL.DISTILL.TEACHERS = []
    for key in ("CONFIG_FILE", "WEIGHTS", "CLASSES"):
        cfg.MODEL.DISTILL.TEACHER[key] = section[key]
    return cfg


def built(cfg: CfgNode) -> DistillModel:
    torch.manual_seed(0)
    return DistillModel(cfg).train()


def losses_of(model: DistillModel, inputs: list[Any]) -> dict[str, Tensor]:
    torch.manual_seed(1)  # for the proposals that the student samples
    with EventStorage():
        return model(inputs)


def refused(cfg: CfgNode) -> str:
    with pytest.raises(ConfigError) as error:
        validate_config(cfg, training=False)
    return str(error.value)


# ---- Losses


@pytest.mark.parametrize(
    ("family", "objects"), [("faster", (2, 1)), ("faster", (0, 0)), ("retinanet", (1, 0))]
)
def test_the_losses_are_those_of_one_teacher_each(
    family: str, objects: tuple[int, int], tmp_path: Path
) -> None:
    teachers = sections(tmp_path, family)
    teachers[1]["FACTOR"] = 2.0
    model = built(cfg := config(family, teachers))
    assert list(model.heads) == [f"{head}@{name}" for name in KNOWN for head in HEADS[family]]
    inputs = [image_dict(k, objects=n) for k, n in enumerate(objects)]
    losses = losses_of(model, inputs)
    expected: dict[str, Tensor] = {}
    for section, factor in zip(teachers, (1.0, 2.0)):
        single = built(alone(cfg, section))
        for name, head in single.heads.items():
            head.load_state_dict(model.heads[f"{name}@{section['NAME']}"].state_dict())
        for loss, value in losses_of(single, inputs).items():
            whole, _, part = loss.partition("/")
            if whole.removeprefix("loss_") in [x.lower() for x in HEADS[family]]:
                name = "/".join(filter(None, (f"{whole}@{section['NAME']}", part)))
                expected[name] = value * factor
            else:
                expected[loss] = value
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=0, msg=name)
    assert any(losses[x] != 0 for x in losses if "@persons" in x)


def test_a_teacher_computes_only_what_its_own_heads_read(tmp_path: Path) -> None:
    teachers = sections(tmp_path, "faster")
    for section, head in zip(teachers, HEADS["faster"]):
        section["HEADS"] = [head]
    model = built(config("faster", teachers))
    assert list(model.heads) == ["FitNet@vehicles", "ROIKD@persons"]
    needs = {name: model.active_needs(teacher=name) for name in model.teachers}
    assert needs == {"vehicles": {"features"}, "persons": {"rois"}}
    assert model.active_needs() == {"features", "rois"}
    asked = []
    for name, teacher in model.teachers.items():
        ask = teacher.ask
        teacher.ask = lambda *args, name=name, ask=ask: asked.append(name) or ask(*args)
    model.heads["ROIKD@persons"].weight = 0.0  # type: ignore[union-attr]
    losses_of(model, [image_dict(0)])
    assert asked == ["vehicles"]


def test_heads_without_a_teacher_exist_once(tmp_path: Path) -> None:
    model = built(config("faster", sections(tmp_path, "faster"), heads=("FitNet", "LGD")))
    assert list(model.heads) == ["FitNet@vehicles", "FitNet@persons", "LGD"]
    assert [name for name, x in losses_of(model, [image_dict(0)]).items() if "lgd" in name]


def test_frozen_teachers_are_outside_of_the_model(tmp_path: Path) -> None:
    model = built(config("faster", sections(tmp_path, "faster")))
    parameters = {id(x) for x in model.parameters()}
    names = {x.split(".")[1] for x in model.state_dict() if x.startswith("heads.")}
    assert names == {"FitNet@persons"}  # the other teacher has the student's channels
    for teacher in model.teachers.values():
        assert not any(id(x) in parameters or x.requires_grad for x in teacher.model.parameters())
        assert not any(x.training for x in teacher.model.modules())
    prefixes = ["", "teacher.vehicles.", "teacher.persons."]
    assert list(_networks(model)) == prefixes  # by which `distill replay` names modules


# ---- The balance


def test_the_teachers_share_the_ratio_by_their_factors(tmp_path: Path) -> None:
    teachers = sections(tmp_path, "faster", HEADS=["FitNet"])
    teachers[1]["FACTOR"] = 0.5
    mode = ("MODEL.DISTILL.BALANCE.MODE", "auto")
    model = built(config("faster", teachers, *mode, heads=("FitNet",)))
    balance = model.balance
    assert balance is not None
    for iteration in range(2):
        torch.manual_seed(1)
        with EventStorage(iteration), balance.step():
            sum(model([image_dict(0)]).values()).backward()
    places = [f"backbone.p{k}" for k in range(2, 7)]
    assert list(balance.measured) == places
    for place in places:
        assert set(balance.measured[place]) == {"FitNet@vehicles", "FitNet@persons"}
    # Two heads compare each map: the ratio of each is half of 3.0, times its factor.
    with EventStorage(1):
        assert balance.share("FitNet@vehicles") == pytest.approx(1.5)
        assert balance.share("FitNet@persons") == pytest.approx(0.75)


# ---- Classes


def test_the_log_says_who_teaches_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teachers = sections(tmp_path, "faster", {"vehicles": ("class 0",), "others": ("else",)})
    with caplog.at_level(logging.INFO):
        built(config("faster", teachers))
    text = caplog.text
    file = teachers[0]["CONFIG_FILE"]
    classes = "it knows these classes of the student"
    assert f"Teacher vehicles ({file}) teaches with FitNet, ROIKD; {classes}: class 0." in text
    assert f"teaches with FitNet; {classes}: none." in text
    (line,) = [x.getMessage() for x in caplog.records if "no teacher of" in x.getMessage()]
    assert line.endswith("are taught by their labels only (ROIKD: class 1, class 2).")


def test_nothing_is_said_where_the_union_covers_the_student(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built(config("faster", sections(tmp_path, "faster")))
    assert "no teacher of" not in caplog.text


# ---- One config per teacher


def test_keys_of_a_section_and_their_defaults(tmp_path: Path) -> None:
    teachers = sections(tmp_path, "faster")
    teachers[0]["SCALE"] = 2.0
    teachers[1]["CACHE"] = {"DIR": "maps"}
    cfg = config("faster", teachers, "MODEL.DISTILL.TEACHER.CACHE.DTYPE", "bfloat16")
    path = write_config(cfg, tmp_path / "several.yaml")
    cfg.merge_from_file(str(path))  # as a yaml has them
    vehicles, persons = one_per_teacher(cfg)
    assert (vehicles.name, persons.name) == ("vehicles", "persons")
    nodes = [x.cfg.MODEL.DISTILL.TEACHER for x in (vehicles, persons)]
    assert [x.SCALE for x in nodes] == [2.0, 1.0]
    assert [(x.CACHE.DIR, x.CACHE.DTYPE) for x in nodes] == [("", "bfloat16"), ("maps", "bfloat16")]
    assert nodes[0].CLASSES == ("class 0", "class 2") and "NAME" not in nodes[0]
    assert not vehicles.cfg.MODEL.DISTILL.TEACHERS
    assert teachers[0]["WEIGHTS"] == teacher_config(vehicles.cfg).MODEL.WEIGHTS
    # A file is read only once.
    assert teacher_config(one_per_teacher(cfg)[0].cfg) is teacher_config(vehicles.cfg)
    cfg = tiny_cfg("faster")
    assert one_per_teacher(cfg)[0].cfg is cfg


A, B = {"NAME": "a", "CONFIG_FILE": "a.yaml"}, {"NAME": "b", "CONFIG_FILE": "b.yaml"}
REFUSED: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "no section": (["a.yaml"], (), "TEACHERS[0] is 'a.yaml'; it must be KEY: VALUE pairs"),
    "no name": ([{"CONFIG_FILE": "a.yaml"}], (), "TEACHERS[0].NAME is empty"),
    "no word": ([{**A, "NAME": "a b"}], (), "TEACHERS[0].NAME is 'a b'; it must be letters"),
    "one name": ([A, {**B, "NAME": "A"}], (), "has the names a, A; each teacher needs its own"),
    "unknown key": ([{**A, "WEIGHT": "x"}], (), "Unknown config key 'WEIGHT' in MODEL.DISTILL"),
    "wrong type": ([A, {**B, "CLASSES": "car"}], (), "CLASSES must be of type tuple; car is of"),
    "wrong value": ([{**A, "SCALE": 9.0}], (), "TEACHERS[0].SCALE is 9.0; it must be in [0.25, 4]"),
    "wrong factor": ([{**A, "FACTOR": 0.0}], (), "TEACHERS[0].FACTOR is 0.0; it must be above 0"),
    "unknown head": ([{**A, "HEADS": ["CWD"]}], (), "TEACHERS[0].HEADS: unknown value 'CWD'"),
    "itself": ([{**A, "HEADS": ["LGD"]}], (), "TEACHERS[0].HEADS: unknown value 'LGD'"),
    "untaught head": ([{**A, "HEADS": ["FitNet"]}], (), "HEADS has ROIKD, but no HEADS of"),
    "detections": ([{**A, "DETECTIONS": "x.json"}], (), "set MODEL.DISTILL.TEACHER.DETECTIONS for"),
    "both keys": ([A], ("MODEL.DISTILL.TEACHER.CONFIG_FILE", "c.yaml"), "empty one of the two"),
    "inherit": ([A], ("MODEL.DISTILL.INHERIT", ("neck",)), "which is not for several teachers"),
    "no list": ("a", (), "MODEL.DISTILL.TEACHERS"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_sections(case: str) -> None:
    teachers, opts, message = REFUSED[case]
    if case == "no list":
        with pytest.raises(ConfigError, match="must be of type list"):
            config("faster", teachers)
        return
    cfg = config("faster", teachers, *opts, heads=("FitNet", "ROIKD", "LGD"))
    assert message in refused(cfg)


def test_a_section_may_not_permit_code(tmp_path: Path) -> None:
    teachers = [{**A, "CONFIG_FILE": sections(tmp_path, "faster")[0]["CONFIG_FILE"]}]
    teachers[0]["OPTS"] = ["MODEL.ALLOW_CODE", True]
    with pytest.raises(ConfigError, match=r"Teacher a of .*ALLOW_CODE"):
        built(config("faster", teachers))


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        (
            {"CLASSES": ["car"]},
            ("ROIKD",),
            r"^Teacher persons of MODEL.DISTILL.TEACHERS: it teaches nothing, because no head "
            r"works with it \(ROIKD: student classes .* have no name in common",
        ),
        (
            {"CLASSES": ["car"], "HEADS": ["ROIKD"]},
            ("FitNet", "ROIKD"),
            "^Teacher persons .* MODEL.DISTILL.HEADS: ROIKD does not work here",
        ),
        ({}, ("FitNet", "PixelKD"), "PixelKD works with no teacher .vehicles: it compares sem_seg"),
        ({"WEIGHTS": "gone.pth"}, ("FitNet",), "^Teacher persons of .*gone.pth"),
    ],
)
def test_a_teacher_or_head_that_would_teach_nothing(
    change: dict[str, Any], heads: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    teachers = sections(tmp_path, "faster")
    teachers[1].update(change)
    with pytest.raises(DistillError, match=message):
        built(config("faster", teachers, heads=heads))


# ---- Checkpoints


def test_a_resume_compares_each_teacher(tmp_path: Path) -> None:
    teachers = sections(tmp_path, "faster")
    hashes = {"vehicles": "1" * 64, "persons": "2" * 64}
    saved = training_values(config("faster", teachers), hashes)
    assert not changed_values(saved, training_values(config("faster", teachers), hashes))

    def changed(opts: dict[str, Any], of: dict[str, str] = hashes) -> list[str]:
        other = [teachers[0], {**teachers[1], **opts}]
        return list(changed_values(saved, training_values(config("faster", other), of)))

    assert changed({"WEIGHTS": "moved.pth"}) == []  # its content counts
    assert changed({}, {**hashes, "persons": "3" * 64}) == [f"{KEY}.persons.WEIGHTS"]
    assert changed({"SCALE": 2.0}) == [f"{KEY}.persons.SCALE"]
    assert changed({"FACTOR": 2.0}) == [f"{KEY}.persons.FACTOR"]
    assert changed({"HEADS": ["FitNet"]}) == [f"{KEY}.persons.HEADS"]
    assert takes_effect(f"{KEY}.persons.FACTOR") and not takes_effect(f"{KEY}.persons.SCALE")
    fewer = training_values(config("faster", teachers[:1]), hashes)
    assert list(changed_values(saved, fewer)) == [KEY]


def shapes_cfg(folder: Path, shapes: Shapes, output: str, *opts: Any) -> CfgNode:
    """Return the config of a student of eight classes, six of which have teachers."""
    distillation = (
        *distill_opts("faster", HEADS["faster"]),
        KEY,
        sections(folder, "faster", OTHERS),
    )
    opts = (*distillation, "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2, *opts)
    return trainable_cfg("faster", shapes, folder / output, *opts, norm="BN")


@pytest.mark.e2e
@pytest.mark.slow
def test_a_resumed_training_has_the_same_bits(tmp_path: Path, shapes: Shapes) -> None:
    mode = ("MODEL.DISTILL.BALANCE.MODE", "gradient")
    whole = train(shapes_cfg(tmp_path, shapes, "whole", *mode))
    cached = ("MODEL.DISTILL.TEACHER.CACHE.DIR", str(tmp_path / "maps"))
    cfg = shapes_cfg(tmp_path, shapes, "parts", *mode, *cached)  # which changes no bit
    with pytest.raises(Interrupted):
        train(cfg, Interruption(2))
    resumed = train(cfg, resume=True, seed=4)
    assert any("@vehicles" in x for x in whole["balance"]["terms"])
    for key in ("model", "distill", "balance"):
        assert differences(whole[key], resumed[key]) == []
    rows = (tmp_path / "whole" / "metrics.json").read_text()
    assert "loss_roikd@vehicles" in rows and "kd_ratio/fitnet@persons/backbone.p2" in rows
    fewer = shapes_cfg(tmp_path, shapes, "parts", *mode)
    fewer.MODEL.DISTILL.TEACHERS = fewer.MODEL.DISTILL.TEACHERS[:1]
    with pytest.raises(DistillError, match=r"MODEL.DISTILL.TEACHERS is .*vehicles"):
        train(fewer, resume=True)


# ---- Commands


@pytest.mark.slow
def test_the_doctor_examines_each_teacher(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = shapes_cfg(tmp_path, shapes, "output")
    cfg.MODEL.DISTILL.TEACHERS[1]["HEADS"] = ["FitNet"]
    report = examine(cfg, teacher_images=2)
    heads = ["FitNet@vehicles", "ROIKD@vehicles", "FitNet@persons"]
    assert report.heads == heads and not report.teacher and not report.outputs
    assert {x.head for x in report.losses} == {None, *heads}
    for section in cfg.MODEL.DISTILL.TEACHERS:
        own = report.teachers[section["NAME"]]
        assert own.teacher == "GeneralizedRCNN" and own.teacher_weights == section["WEIGHTS"]
        assert own.classes is not None and own.classes.teacher == section["CLASSES"]
        assert own.preprocessing and own.teacher_check and own.teacher_cost
        cost = own.teacher_cost
        assert cost.seconds > 0 and cost.parameters_mb > 0
        shown = {x.head for row in own.outputs for x in row.heads}
        assert shown == {x for x in heads if x.endswith(section["NAME"])}
    costs = [x.teacher_cost for x in report.teachers.values()]
    # P2 to P6 of two images, padded to 96 x 96, with 24 channels and four bytes for a number.
    cells = sum(n**2 for n in (24, 12, 6, 3, 2))
    assert [x.outputs_mb for x in costs if x][1] == pytest.approx(2 * cells * 24 * 4 / 2**20)
    path = str(write_config(cfg, tmp_path / "several.yaml"))
    assert cli.main(["doctor", "--config-file", path, "--list-heads"]) == 0
    text = capsys.readouterr().out
    assert "Networks of vehicles" in text and "Heads of persons" in text


def test_commands_of_pairs(tmp_path: Path) -> None:
    teachers = sections(tmp_path, "faster")
    cfg = config("faster", teachers, "DATASETS.TRAIN", ("coco_2017_val",))
    pair = NetworkPair(cfg, taught=True, trained=False)
    assert set(pair.infos) == {"vehicles", "persons"}
    # Five 1x1 adapters from 16 to 24 channels; the other teacher has 16.
    assert pair.extra_parameters(method_config(cfg, "FitNet", [])) == 5 * (16 * 24 + 24)
    with pytest.raises(ConfigError, match=r"PixelKD: it compares sem_seg|no head works"):
        pair.extra_parameters(method_config(cfg, "PixelKD", []))
    assert method_config(cfg, "LGD", []).MODEL.DISTILL.TEACHERS == []


def test_no_common_class_is_one_line(
    tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = shapes_cfg(tmp_path, shapes, "output", "MODEL.DISTILL.HEADS", ("ROIKD",))
    cfg.MODEL.DISTILL.TEACHERS[0]["CLASSES"] = ["car", "truck", "bus"]
    path = str(write_config(cfg, tmp_path / "several.yaml"))
    assert cli.main(["doctor", "--config-file", path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Teacher vehicles of MODEL.DISTILL.TEACHERS: it teaches nothing")


def test_the_report_takes_each_class_from_the_first_teacher_that_knows_it(
    tmp_path: Path, shapes: Shapes
) -> None:
    cfg = trainable_cfg("faster", shapes, tmp_path)
    info = network_info("teacher", tiny_model("faster"), CLASSES[:3])
    assert classes_on(cfg, shapes[0], info).in_teacher.tolist() == [0, 1, 2]
    assert classes_on(cfg, shapes[0], info, {CLASSES[1]}).in_teacher.tolist() == [0, 2]


@pytest.mark.slow
def test_a_proof_has_a_random_teacher_for_each(
    tmp_path: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "step_seconds", lambda cfgs, *_: dict.fromkeys(cfgs, 0.1))
    cfg = shapes_cfg(tmp_path, shapes, "output", "DATASETS.TEST", (shapes[0],))
    path = str(write_config(cfg, tmp_path / "several.yaml"))
    parser = argparse.ArgumentParser()
    prove.add_arguments(parser)
    arguments = ["--config-file", path, "--out", str(tmp_path / "out"), "--seeds", "2"]
    configs = prove.Proof(parser.parse_args(arguments)).configs
    trained, random = (
        [x["WEIGHTS"] for x in configs[k].MODEL.DISTILL.TEACHERS]
        for k in ("FitNet+ROIKD", "random-teacher")
    )
    assert trained == [x["WEIGHTS"] for x in cfg.MODEL.DISTILL.TEACHERS]
    assert len({*trained, *random}) == 4 and all(Path(x).is_file() for x in random)
    validate_config(configs["random-teacher"])


@pytest.mark.parametrize("command", [["compare", "--train-teacher"], ["prove", "--shapes"]])
def test_commands_that_train_one_teacher_refuse_several(
    command: list[str], tmp_path: Path, shapes: Shapes, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = shapes_cfg(tmp_path, shapes, "output", "DATASETS.TEST", (shapes[0],))
    path = str(write_config(cfg, tmp_path / "several.yaml"))
    arguments = [*command, "--out", str(tmp_path / "out"), "--config-file", path]
    assert cli.main(arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "trains one teacher, but MODEL.DISTILL.TEACHERS names several" in line


def test_the_benchmark_asks_all_teachers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config("faster", sections(tmp_path, "faster"), heads=("FitNet",))
    cfg.DATASETS.TRAIN = ("coco_2017_val",)
    path = str(write_config(cfg, tmp_path / "several.yaml"))
    sizes = ["--size", "64x64", "--repeats", "1", "--parts", "heads"]
    assert cli.main(["benchmark", "--config-file", path, *sizes]) == 0
    text = capsys.readouterr().out
    assert "FitNet@vehicles" in text and "FitNet@persons" in text


@pytest.mark.slow
def test_figures_have_the_teacher_of_their_head(tmp_path: Path, shapes: Shapes) -> None:
    cfg = shapes_cfg(tmp_path, shapes, "output", "MODEL.DISTILL.HEADS", ("MKD",))
    visualize.draw_methods(cfg, "0", visualize.RANDOM, tmp_path / "figures")
    names = {x.name.split("_")[-1] for x in (tmp_path / "figures").iterdir()}
    assert names == {"mkd@vehicles.png", "mkd@persons.png"}


def test_advice_names_the_section_of_the_head() -> None:
    sentence = ratio_warning("loss_roikd@vehicles", 1e-6)
    assert sentence is not None
    assert "raise MODEL.DISTILL.ROIKD.WEIGHT or FACTOR of the teacher vehicles." in sentence
