"""A config is loaded once: its files, overrides, schedule, output folder and teacher."""

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode

from distill.config import (
    get_distill_cfg,
    load_config,
    merge_from_file,
    student_config,
    teacher_config,
    validate_config,
)
from distill.config.load import scale_schedule
from distill.engine import setup_config
from distill.errors import ConfigError
from distill.launch.main import argument_parser, configure, main
from tests.support.networks import distill_opts
from tests.support.trainings import trainable_cfg, write_teacher

COCO = (90_000, (60_000, 80_000))
VOC = (18_000, (12_000, 16_000))
CITYSCAPES = (24_000, (18_000,))


def write(path: Path, text: str = "SEED: 3\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def schedule_of(cfg: CfgNode) -> tuple[int, tuple[int, ...]]:
    return cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS)


# ---- Schedule.


@pytest.mark.parametrize(
    "base, schedule, expected",
    [
        (COCO, "1x", COCO),
        (COCO, "2x", (180_000, (120_000, 160_000))),
        (COCO, "3x", (270_000, (210_000, 250_000))),
        (VOC, "2x", (36_000, (24_000, 32_000))),
        (VOC, "3x", (54_000, (42_000, 50_000))),
        (CITYSCAPES, "2x", (48_000, (36_000,))),
        (CITYSCAPES, "3x", (72_000, (60_000,))),
        ((40, (30_000,)), "3x", (120, (60_040,))),  # detectron2's default step is never reached
    ],
)
def test_a_schedule_is_detectron2s(base: Any, schedule: str, expected: Any, tmp_path: Path) -> None:
    assert scale_schedule(*base, int(schedule[0])) == expected
    path = write(tmp_path / "c.yaml", f"SOLVER: {{MAX_ITER: {base[0]}, STEPS: {list(base[1])}}}")
    cfg = load_config(path, ["SOLVER.SCHEDULE", schedule])
    assert schedule_of(cfg) == expected
    write(tmp_path / "config.yaml", cfg.dump())  # as detectron2 writes it to OUTPUT_DIR
    assert schedule_of(load_config(str(tmp_path / "config.yaml"))) == expected


def test_a_schedule_without_steps_keeps_them(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "SOLVER: {MAX_ITER: 40000, LR_SCHEDULER_NAME: WarmupPolyLR}")
    assert schedule_of(load_config(path, ["SOLVER.SCHEDULE", "2x"])) == (80_000, (30_000,))


def test_a_schedule_of_a_file_gives_way_to_the_command_line(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "SOLVER: {MAX_ITER: 90, STEPS: [60, 80], SCHEDULE: 2x}")
    path = write(tmp_path / "c.yaml", f"_BASE_: {base}\nSEED: 1\n")
    assert schedule_of(load_config(path)) == (180, (120, 160))
    assert schedule_of(load_config(path, ["SOLVER.SCHEDULE", "1x"])) == (90, (60, 80))


def test_overridden_iterations_are_not_scaled(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "SOLVER: {MAX_ITER: 90, STEPS: [60, 80], SCHEDULE: 2x}")
    assert schedule_of(load_config(path, ["SOLVER.MAX_ITER", "7"])) == (7, (120, 160))
    opts = ["SOLVER.STEPS", "(5,)", "SOLVER.SCHEDULE", "3x"]
    assert schedule_of(load_config(path, opts)) == (270, (5,))


def test_the_option_of_the_command_line(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "c.yaml", "DATASETS: {TRAIN: ['coco_2017_train']}")
    args = argument_parser().parse_args(["--config-file", path, "--schedule", "2x"])
    cfg, _ = configure(args)
    assert schedule_of(cfg) == (80_000, (60_000,)) and cfg.SOLVER.SCHEDULE == "1x"
    assert main(["--config-file", path, "--schedule", "4x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: SOLVER.SCHEDULE: unknown value '4x'") and "3x, 2x, 1x" in line


def test_a_schedule_that_was_not_applied_is_refused() -> None:
    cfg = get_distill_cfg()
    cfg.SOLVER.SCHEDULE = "2x"
    with pytest.raises(ConfigError, match=r"SOLVER\.SCHEDULE is 2x.*load_config"):
        validate_config(cfg, training=False)


# ---- Output folder.


@pytest.mark.parametrize(
    "file, folder",
    [
        ("configs/COCO-Detection/IMA/a-b_1x.yaml", "output/COCO-Detection/IMA/a-b_1x"),
        ("configs/Shapes-Detection/a.yaml", "output/Shapes-Detection/a"),
        ("configs/a.yaml", "output/a"),
        ("configs/old/configs/a.yaml", "output/a"),
        ("my_configs/b/a.yaml", "output/a"),
    ],
)
def test_output_goes_where_the_file_lies(
    file: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / file)
    assert folder == load_config(path).OUTPUT_DIR
    monkeypatch.chdir(Path(path).parent)
    assert folder == load_config(Path(path).name).OUTPUT_DIR


def test_a_folder_that_is_set_wins(tmp_path: Path) -> None:
    base = write(tmp_path / "configs" / "base.yaml", "OUTPUT_DIR: elsewhere\n")
    path = write(tmp_path / "configs" / "a.yaml", f"_BASE_: {base}\n")
    assert load_config(path).OUTPUT_DIR == "elsewhere"
    assert load_config(path, ["OUTPUT_DIR", "here"]).OUTPUT_DIR == "here"
    assert load_config(path, ["OUTPUT_DIR", ""]).OUTPUT_DIR == "output/a"
    # detectron2's default is a folder as any other if somebody names it.
    assert load_config(path, ["OUTPUT_DIR", "./output"]).OUTPUT_DIR == "./output"
    assert load_config("").OUTPUT_DIR == get_distill_cfg().OUTPUT_DIR == "./output"


@pytest.mark.parametrize(
    "name, schedule, folder",
    [
        ("a_1x", "2x", "a_2x"),
        ("a_1x", "1x", "a_1x"),
        ("a", "1x", "a"),
        ("a", "3x", "a_3x"),
    ],
)
def test_another_schedule_has_a_folder_of_its_own(
    name: str, schedule: str, folder: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "configs" / f"{name}.yaml")
    assert f"output/{folder}" == load_config(path, ["SOLVER.SCHEDULE", schedule]).OUTPUT_DIR


def test_a_files_own_schedule_has_its_own_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "configs" / "a.yaml", "SOLVER: {SCHEDULE: 2x}")
    assert load_config(path).OUTPUT_DIR == "output/a"
    assert load_config(path, ["SOLVER.SCHEDULE", "1x"]).OUTPUT_DIR == "output/a_1x"


# ---- Teacher.


def with_teacher(folder: Path, **keys: Any) -> CfgNode:
    cfg = get_distill_cfg()
    cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = write(folder / "teacher.yaml")
    for key, value in keys.items():
        cfg.MODEL.DISTILL.TEACHER[key] = value
    return cfg


def test_a_teachers_config_is_read_once(tmp_path: Path) -> None:
    cfg = with_teacher(tmp_path)
    teacher = teacher_config(cfg)
    assert teacher.SEED == 3 and teacher.is_frozen()
    write(tmp_path / "teacher.yaml", "SEED: 4\n")
    for copied in (cfg, cfg.clone(), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        copied.freeze()
        assert teacher_config(copied).SEED == 3
    assert "SEED: 3" not in cfg.dump()
    cfg.defrost()
    cfg.MODEL.DISTILL.TEACHER.OPTS = ["MODEL.ANCHOR_GENERATOR.SIZES", [[8]]]  # is another teacher
    assert teacher_config(cfg).SEED == 4


def test_the_words_about_a_teacher_win_in_order(tmp_path: Path) -> None:
    opts = ["MODEL.WEIGHTS", "of_opts.pth", "SOLVER.SCHEDULE", "2x"]
    teacher = teacher_config(with_teacher(tmp_path, OPTS=opts))
    assert teacher.MODEL.WEIGHTS == "of_opts.pth" and teacher.SOLVER.MAX_ITER == 80_000
    teacher = teacher_config(with_teacher(tmp_path, OPTS=opts, WEIGHTS="given.pth"))
    assert teacher.MODEL.WEIGHTS == "given.pth"


# ---- Permissions.


@pytest.mark.parametrize("value", ["True", "'True'", "1 > 0"])
def test_a_permission_of_a_file(value: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", f"MODEL: {{ALLOW_PICKLE: {value}}}")
    with pytest.raises(ConfigError, match=r"ALLOW_PICKLE"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"ALLOW_PICKLE"):
        merge_from_file(get_distill_cfg(), path)


def test_a_permission_of_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "MODEL: {ALLOW_PICKLE: False}")
    assert load_config(path, ["MODEL.ALLOW_PICKLE", "True"]).MODEL.ALLOW_PICKLE
    dumped = write(tmp_path / "config.yaml", "MODEL: {ALLOW_PICKLE: True}")
    assert not load_config(dumped, ["MODEL.ALLOW_PICKLE", "False"]).MODEL.ALLOW_PICKLE
    cfg = get_distill_cfg()
    cfg.MODEL.ALLOW_PICKLE = True  # by a Python caller
    merge_from_file(cfg, dumped)
    assert "ALLOW_PICKLE" not in student_config(cfg).MODEL


def test_a_later_permission_has_the_same_rule(tmp_path: Path) -> None:
    cfg = get_distill_cfg()
    cfg.DATASETS.ALLOW_LINKS = False
    with pytest.raises(ConfigError, match=r"DATASETS\.ALLOW_LINKS is True in .*c\.yaml"):
        merge_from_file(cfg, write(tmp_path / "c.yaml", "DATASETS: {ALLOW_LINKS: True}"))


def test_a_teacher_has_the_permissions_of_the_command_line(tmp_path: Path) -> None:
    """Its weights are read with the student's, so its overrides would not count either."""
    cfg = with_teacher(tmp_path, OPTS=["MODEL.ALLOW_PICKLE", True])
    with pytest.raises(ConfigError, match=r"ALLOW_PICKLE is True in MODEL\.DISTILL\.TEACHER\.OPTS"):
        teacher_config(cfg)
    write(tmp_path / "teacher.yaml", "MODEL: {ALLOW_PICKLE: True}")
    cfg.MODEL.DISTILL.TEACHER.OPTS = []
    with pytest.raises(ConfigError, match=r"ALLOW_PICKLE is True in .*teacher\.yaml"):
        teacher_config(cfg)
    cfg.MODEL.ALLOW_PICKLE = True
    assert teacher_config(cfg).MODEL.ALLOW_PICKLE


# ---- A start.


@pytest.mark.e2e
def test_a_start_loads_and_validates_once(
    tmp_path: Path, shapes: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = write_teacher(tmp_path, "faster", "MODEL.ROI_HEADS.NUM_CLASSES", 8)
    opts += [*distill_opts("faster", ["IMA", "ROIKD"]), "SOLVER.MAX_ITER", 1]
    cfg = trainable_cfg("faster", shapes, tmp_path / "out", *opts)
    path = write(tmp_path / "config.yaml", cfg.dump())
    calls: Counter[str] = Counter()

    def counted(module: str, name: str, described: Any) -> None:
        function = getattr(__import__(module, fromlist=[name]), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[described(*args)] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(f"{module}.{name}", call)

    counted("distill.config.load", "_read_yaml", lambda file: Path(file).name)
    counted("distill.engine.setup", "validate_config", lambda cfg: "validated")
    counted("distill.engine.setup", "register_own_sets", lambda cfg, names: "registered")
    assert main(["--config-file", path]) == 0
    assert calls == {"config.yaml": 1, "teacher.yaml": 1, "validated": 1, "registered": 1}


def test_evaluation_reads_no_teacher(tmp_path: Path, shapes: tuple[str, str, str]) -> None:
    opts = [*distill_opts("faster", ["IMA"]), "MODEL.DISTILL.TEACHER.CONFIG_FILE", "gone.yaml"]
    cfg = trainable_cfg("faster", shapes, tmp_path / "out", *opts)
    path = write(tmp_path / "config.yaml", cfg.dump())
    assert setup_config(path, training=False).is_frozen()
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        setup_config(path)


def test_a_base_is_found_by_name(tmp_path: Path) -> None:
    """As a path relative to the file first; a config of this package needs its folder."""
    for name in ("configs/COCO-Detection/fcos_R_50_FPN.yaml", "COCO-Detection/fcos_R_50_FPN.yaml"):
        (tmp_path / "own.yaml").write_text(f"_BASE_: [{name}, configs/Base-R-101.yaml]\n")
        cfg = load_config(str(tmp_path / "own.yaml"))
        assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RESNETS.DEPTH) == ("FCOS", 101)
    (tmp_path / "own.yaml").write_text("_BASE_: Base-R-101.yaml\n")
    with pytest.raises(ConfigError, match=r"no file .*Base-R-101\.yaml'. A _BASE_ is a path"):
        load_config(str(tmp_path / "own.yaml"))
    (tmp_path / "Base-R-101.yaml").write_text("SEED: 7\n")
    assert load_config(str(tmp_path / "own.yaml")).SEED == 7


@pytest.mark.parametrize("schedule", ["1x", "2x"])
def test_steps_that_are_no_numbers(schedule: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("SOLVER: {STEPS: [null]}\n")
    with pytest.raises(ConfigError, match=r"SOLVER\.STEPS is "):
        validate_config(load_config(str(tmp_path / "own.yaml"), ["SOLVER.SCHEDULE", schedule]))
