"""Every way of starting several processes trains; every way of ending leaves one clear sentence."""

import errno
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from distill.errors import ConfigError, DataError, DistillError
from distill.launch.main import main
from distill.launch.process_group import (
    ProcessInfo,
    await_first,
    first_host,
    from_arguments,
    from_slurm,
    port_of,
    tasks_per_node,
)
from distill.launch.termination import SecondaryError, resume_hint, user_error
from tests.support.networks import write_config
from tests.support.processes import needs_loopback, start, starts_processes, with_forks
from tests.support.trainings import trainable_cfg

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools" / "train_net.py")
DEADLINE = 90  # seconds for what takes ten on a free machine
LAUNCH = ("--num-gpus", "2", "--dist-url", "auto")
STEP = {  # SLURM's, with two tasks on one node
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}


# ---- Places.


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[01-04,07]", "node01"),
        ("node[7,01-04]", "node7"),
        ("gpu-[008-011].cluster,login1", "gpu-008.cluster"),
        ("rack1-[3]-ib,rack2-[1-2]", "rack1-3-ib"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",node1", "node[", "node[a-b]", "node[1-2"])
def test_a_node_list_without_a_host(nodes: str) -> None:
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NODELIST is .*MASTER_ADDR"):
        first_host(nodes)


@pytest.mark.parametrize(
    "text, sizes", [("4", [4]), ("2(x3)", [2, 2, 2]), ("2(x2),1", [2, 2, 1]), ("1,8", [1, 8])]
)
def test_tasks_per_node(text: str, sizes: list[int]) -> None:
    assert tasks_per_node(text) == sizes


def test_a_place_in_a_slurm_step() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "node[03-04]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "2",
        "SLURM_JOB_ID": "123456",
    }
    place = from_slurm(step)
    assert place and place.url.startswith("tcp://node03:")
    assert 10000 <= int(place.url.rpartition(":")[2]) < 30000
    assert place == from_slurm({**step, "SLURM_PROCID": "6", "SLURM_STEP_ID": "0"})
    assert place.url != from_slurm({**step, "SLURM_STEP_ID": "1"}).url  # type: ignore[union-attr]
    master = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert from_slurm({**step, **master}) == ProcessInfo(6, 8, 2, 4, "tcp://10.0.0.1:29500")


@pytest.mark.parametrize("tasks", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_is_alone(tasks: dict[str, str]) -> None:
    """Its SLURM_NTASKS counts the tasks that srun would start."""
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert from_slurm({**batch, **tasks}) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"SLURM_PROCID": "2"}, ["contradict", "SLURM_PROCID 2"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, ["contradict", "[1]"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, ["SLURM_STEP_TASKS_PER_NODE is 'two'"]),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NUM_TASKS": "3"},
            ["--ntasks-per-node", "[2, 1]"],
        ),
        ({"SLURM_LOCALID": "0"}, ["SLURM_LOCALID 0", "--distribution=block"]),
        ({"SLURM_PROCID": ""}, ["SLURM_PROCID is not set"]),
        ({"SLURM_PROCID": "-1"}, ["SLURM_PROCID is '-1'"]),
        ({"SLURM_STEP_NODELIST": ""}, ["SLURM_STEP_NODELIST is not set"]),
        ({"SLURM_JOB_ID": ""}, ["SLURM_JOB_ID is not set"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT is 'http'"]),
    ],
)
def test_variables_that_contradict_each_other(
    changes: dict[str, str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in {**STEP, **changes}.items():
        monkeypatch.setenv(key, value)
    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--num-gpus", "2", "SOLVER.MAXITER", "3"], ["'SOLVER.MAXITER'"]),
        (["--num-machines", "2", "--machine-rank", "2"], ["--machine-rank is 2", "0 to 1"]),
        (["--num-machines", "2", "--dist-url", "auto"], ["--dist-url auto", "one machine"]),
        (["--num-gpus", "2", "--dist-url", "127.0.0.1:1234"], ["--dist-url is '127.0.0.1:1234'"]),
        (["--num-gpus", "2", "--doctor"], ["--doctor", "one process"]),
        (["--dist-timeout", "0"], ["--dist-timeout: '0' is not a whole number from 1"]),
    ],
)
def test_arguments_are_checked_before_anything_starts(
    arguments: list[str],
    words: list[str],
    shapes: tuple[str, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(
        trainable_cfg("faster", shapes, tmp_path / "out"), tmp_path / "config.yaml"
    )
    assert main(["--config-file", str(config), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize("url", ["", "auto", "tcp://host", "tcp://:1", "tcp://h:x", "http://h:1"])
def test_a_meeting_point_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--dist-url is"):
        port_of(url)


@needs_loopback
def test_a_machines_first_place() -> None:
    assert from_arguments(4, 3, 2, "tcp://h:1") == ProcessInfo(8, 12, 0, 4, "tcp://h:1")
    place = from_arguments(2, 1, 0, "auto")
    assert place == ProcessInfo(0, 2, 0, 2, f"tcp://127.0.0.1:{port_of(place.url)}")
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{taken} is taken.*--dist-url auto"):
            from_arguments(2, 1, 0, f"tcp://127.0.0.1:{taken}")


# ---- Sentences, of real errors where they can be had.


class Faulty(Dataset[int]):
    """Its data worker meets a fault."""

    def __init__(self, fault: Callable[[], Any]):
        self.fault = fault

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        self.fault()
        return index


def load(fault: Callable[[], Any], timeout: float = 0) -> None:
    try:
        list(DataLoader(Faulty(fault), num_workers=1, timeout=timeout))
    finally:
        for worker in multiprocessing.active_children():  # the loader would wait five seconds
            worker.terminate()


def write_to_a_full_disk() -> None:
    with open("/dev/full", "w") as f:
        f.write("x")


def find_no_temporary_folder() -> None:
    with mock.patch("tempfile._candidate_tempdir_list", lambda: ["/dev/null"]):
        tempfile._get_default_tempdir()  # type: ignore[attr-defined]


def in_a_worker(fault: Callable[[], Any]) -> None:
    """The error as the data loader raises it in the process that waits for the worker."""
    try:
        fault()
    except Exception:
        ExceptionWrapper(where="in DataLoader worker process 0").reraise()


def take_a_taken_port() -> None:
    server = dist.TCPStore("127.0.0.1", 0, 1, True)
    dist.TCPStore("127.0.0.1", server.port, 1, True)


def wait_for_nobody() -> None:
    dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=1))


def ask_for_nothing() -> None:
    dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=1)).get("nothing")


FAULTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "disk full": (write_to_a_full_disk, ["no space left", "--resume"]),
    "disk full in torch": (
        lambda: torch.save({"x": torch.zeros(10_000)}, "/dev/full"),
        ["no space left", "--resume"],
    ),
    "disk full in a worker": (lambda: in_a_worker(write_to_a_full_disk), ["no space left"]),
    "no temporary folder": (find_no_temporary_folder, ["/dev/null", "TMPDIR", "--resume"]),
    "no memory": (lambda: bytearray(2**60), ["SOLVER.IMS_PER_BATCH", "INPUT.MAX_SIZE_TRAIN"]),
    "no memory in NumPy": (lambda: np.zeros(2**59), ["memory", "SOLVER.IMS_PER_BATCH"]),
    "no memory in torch": (lambda: torch.zeros(2**58), ["memory", "SOLVER.IMS_PER_BATCH"]),
    "worker killed": (
        lambda: load(lambda: os.kill(os.getpid(), signal.SIGKILL)),
        ["pid ", "DATALOADER.NUM_WORKERS", "/dev/shm"],
    ),
    "worker gone": (lambda: load(lambda: os._exit(1)), ["DATALOADER.NUM_WORKERS"]),
    "worker slow": (
        lambda: load(lambda: time.sleep(5), timeout=1),
        ["1 seconds", "DATALOADER.TIMEOUT"],
    ),
    "port taken": (take_a_taken_port, ["--dist-url", "taken"]),
    "nobody comes": (wait_for_nobody, ["1 of 2", "--dist-timeout"]),
    "nobody answers": (ask_for_nothing, ["1 s (--dist-timeout)"]),
}
NEED_LOOPBACK = ("port taken", "nobody comes", "nobody answers")


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_loopback if n in NEED_LOOPBACK else ()) for n in FAULTS]
)
def test_a_fault_has_a_sentence(name: str) -> None:
    fault, words = FAULTS[name]
    with pytest.raises((RuntimeError, OSError, MemoryError)) as caught:
        fault()
    found = user_error(caught.value)
    assert found and all(word in str(found) for word in words), (caught.value, found)
    assert str(found).count("\n") == 0 and "{" not in str(found)


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["IMS_PER_BATCH"]),
        (RuntimeError("unable to open shared memory object </torch_1_2>: No space"), ["/dev/shm"]),
        (RuntimeError("Too many open files. Communication with the workers"), ["ulimit -n"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a.pth"), ["'a.pth'", "--resume"]),
        (
            dist.DistBackendError("NCCL error: Duplicate GPU detected : rank 0 and rank 1"),
            ["--num-gpus"],
        ),
        (
            dist.DistBackendError("ncclRemoteError: remote process exited or there was a network"),
            ["lost the connection"],
        ),
        (
            dist.DistBackendError("Watchdog caught timeout: WorkNCCL(SeqNum=1, Timeout(ms)=10000)"),
            ["10 s (--dist-timeout)"],
        ),
    ],
)
def test_an_error_that_this_machine_cannot_raise(error: Exception, words: list[str]) -> None:
    found = user_error(error)
    assert found and all(word in str(found) for word in words)


def test_bugs_have_no_sentence() -> None:
    for error in (KeyError("x"), RuntimeError("mat1 and mat2"), OSError("Connection refused")):
        assert user_error(error) is None


def test_the_cause_of_a_fault_counts() -> None:
    try:
        try:
            write_to_a_full_disk()
        finally:
            raise KeyError("on the way out")
    except KeyError as e:
        assert "no space left" in str(user_error(e))
    mine = DataError("mine")
    assert user_error(mine) is mine


def test_only_echoes_wait_for_their_cause() -> None:
    lost = user_error(RuntimeError("Connection closed by peer [127.0.0.1]:1940"))
    assert isinstance(lost, SecondaryError)
    assert not isinstance(user_error(MemoryError()), SecondaryError)


@needs_loopback
def test_rank_0_does_not_answer() -> None:
    with pytest.raises(
        DistillError,
        match=r"rank 0 does not answer at tcp://127.0.0.1:1 within 1 s.*--num-machines",
    ):
        await_first("tcp://127.0.0.1:1", timedelta(seconds=1))


def test_the_last_checkpoint_is_named(tmp_path: Path) -> None:
    assert "no checkpoint" in resume_hint(str(tmp_path))
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    assert f"{tmp_path}/model_0000004.pth" in resume_hint(str(tmp_path))


# ---- Runs in processes of their own.


def train_net(argv: list[str], folder: Path, env: dict[str, str]) -> int:
    """The command line in a folder, with further variables of the environment."""
    for key in [x for x in os.environ if x.startswith(("SLURM_", "MASTER_"))]:
        del os.environ[key]
    os.environ.update(env)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(argv)


def forking(argv: list[str], folder: Path, env: dict[str, str]) -> int:
    """:func:`train_net` whose processes are forks."""
    return with_forks(train_net, argv, folder, env)


def torchrun(argv: list[str], folder: Path, env: dict[str, str]) -> int:
    """:func:`train_net` in two processes that torchrun starts; what they write goes to files."""
    os.chdir(folder)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += ["--log-dir", str(folder / "logs"), "--redirects", "3"]
    os.execvpe(run[0], [*run, TOOL, *argv], os.environ | env)


class Runs:
    """Starts the command line in processes of its own, and ends all of them.

    Args:
        config: a training too long to end by itself, with checkpoints on the way.
        folder: for the output.
    """

    def __init__(self, config: Path, folder: Path):
        self.config, self.folder = config, folder
        self.output = folder / "out"
        self.started: list[BaseProcess] = []

    def start(self, *arguments: str, starter: Callable[..., int] = train_net, **env: str) -> int:
        """Returns the number of the run, counted from 0.

        Args:
            starter: calls the command line; some start its processes in another way.
            env: further variables of the environment.
        """
        number = len(self.started)
        argv = ["--config-file", str(self.config), *arguments, "OUTPUT_DIR", str(self.output)]
        err = self.folder / f"stderr_{number}"
        self.started.append(start(starter, argv, self.folder, env, out=Path("/dev/null"), err=err))
        return number

    def train(self, world: int = 2) -> None:
        """Wait for a checkpoint and for metrics of so many processes."""
        files = [self.output / "last_checkpoint", self.output / "metrics.json"]
        wait_until(
            lambda: all(f.is_file() and f.stat().st_size for f in files) or self._ended(),
            "no training",
        )
        assert not self._ended(), self.stderr(0)
        assert f"World size: {world}" in (self.output / "log.txt").read_text()

    def _ended(self) -> bool:
        return any(process.exitcode is not None for process in self.started)

    def wait(self, number: int = 0) -> int | None:
        self.started[number].join(DEADLINE)
        return self.started[number].exitcode

    def stderr(self, number: int = 0) -> str:
        return (self.folder / f"stderr_{number}").read_text(errors="replace")

    def sentence(self, number: int = 0) -> str:
        """The only line that is ours; the rest are warnings of libraries."""
        text = self.stderr(number)
        assert "Traceback" not in text, text
        (line,) = [x for x in text.splitlines() if x.startswith(("error: ", "stopped by "))]
        return line

    def ranks(self, number: int = 0) -> list[int]:
        """Processes of the ranks that a run started, by local rank."""
        everyone = children(self.started[number].pid)
        return [p for p in everyone if "resource_tracker" not in command_of(p)]

    def end(self) -> None:
        for process in self.started:
            everyone = [process.pid, *descendants(process.pid)] if process.is_alive() else []
            for pid in everyone:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.join(DEADLINE)


def wait_until(true: Callable[[], Any], what: str, seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def status(pid: int) -> list[str]:
    """State and parent first."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0"]


def running(pid: int) -> bool:
    return status(pid)[0] not in "XZ"


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")


def children(pid: int) -> list[int]:
    everyone = sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal())
    return [p for p in everyone if status(p)[1] == str(pid)]


def descendants(pid: int) -> list[int]:
    return [x for child in children(pid) for x in (child, *descendants(child))]


def all_gone(pids: list[int]) -> None:
    assert len(pids) > 1
    # A data worker whose parent was killed looks for it every five seconds.
    wait_until(lambda: not any(map(running, pids)), "orphans", seconds=15)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shapes: tuple[str, str, str]) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    cfg = trainable_cfg("faster", shapes, folder)
    cfg.SOLVER.MAX_ITER = 1_000_000
    cfg.SOLVER.CHECKPOINT_PERIOD = 20  # steps of 15 milliseconds
    cfg.DATALOADER.NUM_WORKERS = 1
    return write_config(cfg, folder / "config.yaml")


@pytest.fixture
def runs(config: Path, tmp_path: Path) -> Iterator[Runs]:
    started = Runs(config, tmp_path)
    yield started
    started.end()


def free_port() -> int:
    return port_of(from_arguments(1, 1, 0, "auto").url)


NO_WORKERS = ("DATALOADER.NUM_WORKERS", "0")


def two_machines(runs: Runs, *arguments: str) -> None:
    url = f"tcp://127.0.0.2:{free_port()}"
    for rank in ("0", "1"):
        machine = ("--num-machines", "2", "--machine-rank", rank, "--dist-url", url)
        runs.start(*machine, *arguments, starter=forking)


def slurm_step(runs: Runs, *arguments: str) -> None:
    port = str(free_port())
    for rank in ("0", "1"):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        runs.start(*arguments, **{**STEP, **place})


@pytest.fixture(scope="module")
def stopped(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Two tasks of SLURM, the second one stopped; other tests run while the first waits for it."""
    runs = Runs(config, tmp_path_factory.mktemp("stopped"))
    try:
        slurm_step(runs, "--dist-timeout", "10", *NO_WORKERS)
        runs.train()
        os.kill(runs.started[1].pid, signal.SIGSTOP)
        yield runs
    finally:
        runs.end()


@starts_processes
@needs_loopback
def test_the_tasks_of_a_slurm_step_train(stopped: Runs) -> None:
    """The other ways of starting: below, and in test_main.py."""
    assert '"total_loss"' in (stopped.output / "metrics.json").read_text()


@pytest.mark.slow
@starts_processes
@needs_loopback
def test_a_killed_rank_ends_the_run(runs: Runs) -> None:
    runs.start(*LAUNCH, starter=forking)
    runs.train()
    everyone = descendants(runs.started[0].pid)
    os.kill(runs.ranks()[1], signal.SIGKILL)
    assert runs.wait() == 2
    line = runs.sentence()
    assert line.startswith("error: the process with local rank 1 was killed by SIGKILL")
    assert "--resume" in line
    all_gone(everyone)


@starts_processes
@needs_loopback
def test_a_killed_machine_ends_the_others(runs: Runs) -> None:
    """Nothing but the connection tells them."""
    two_machines(runs, *NO_WORKERS)
    runs.train()
    os.kill(runs.ranks(1)[0], signal.SIGKILL)
    assert [runs.wait(0), runs.wait(1)] == [2, 2]
    assert runs.sentence(0).startswith("error: lost the connection to another process")
    assert runs.sentence(1).startswith("error: the process with local rank 0 was killed by SIGKILL")


@pytest.mark.slow
@starts_processes
@needs_loopback
def test_sigterm_ends_every_process(runs: Runs) -> None:
    """To the first process alone, as docker stop sends it."""
    runs.start(*LAUNCH)
    runs.train()
    everyone = descendants(runs.started[0].pid)
    os.kill(runs.started[0].pid, signal.SIGTERM)
    assert runs.wait() == 128 + signal.SIGTERM
    line = runs.sentence()
    assert line.startswith(f"stopped by SIGTERM: the last checkpoint is {runs.output}/model_")
    assert "--resume" in line
    all_gone(everyone)


@starts_processes
@needs_loopback
def test_ctrl_c_ends_every_process(runs: Runs) -> None:
    """It goes to the whole group, data workers included, and to processes that still import."""
    runs.start(*LAUNCH)
    wait_until(lambda: len(runs.ranks()) == 2, "no ranks")
    everyone = descendants(runs.started[0].pid)
    os.killpg(runs.started[0].pid, signal.SIGINT)
    assert runs.wait() == 128 + signal.SIGINT
    assert runs.sentence().startswith("stopped by SIGINT: there is no checkpoint")
    all_gone(everyone)


@starts_processes
def test_ctrl_c_ends_one_process_and_its_workers(runs: Runs) -> None:
    runs.start()
    runs.train(world=1)
    everyone = descendants(runs.started[0].pid)
    assert everyone
    os.killpg(runs.started[0].pid, signal.SIGINT)
    assert runs.wait() == 128 + signal.SIGINT
    assert runs.sentence().startswith(f"stopped by SIGINT: the last checkpoint is {runs.output}")
    all_gone([runs.started[0].pid, *everyone])


@pytest.mark.long
@pytest.mark.slow
@starts_processes
@needs_loopback
def test_torchrun_ends_without_our_traceback(runs: Runs) -> None:
    """Its own report on stderr has one."""
    runs.start(*NO_WORKERS, starter=torchrun)
    runs.train()
    everyone = descendants(runs.started[0].pid)
    rank_1 = max(p for p in children(runs.started[0].pid) if TOOL in command_of(p))
    os.kill(rank_1, signal.SIGKILL)
    assert runs.wait() != 0
    texts = [f.read_text() for f in runs.folder.rglob("stderr.log")]
    assert len(texts) == 2 and not any("Traceback" in x or "error:" in x for x in texts), texts
    all_gone(everyone)


@starts_processes
@needs_loopback
def test_what_every_rank_finds_is_said_once(runs: Runs) -> None:
    runs.start(*LAUNCH, "SOLVER.IMS_PER_BATCH", "3", starter=forking)
    assert runs.wait() == 2
    assert runs.sentence().startswith("error: SOLVER.IMS_PER_BATCH is 3")


@starts_processes
@needs_loopback
def test_what_one_rank_finds_ends_all(runs: Runs, shapes: tuple[str, str, str]) -> None:
    """One image of six is broken; the process that reads it first reports it."""
    folder = runs.folder / "images"
    folder.mkdir()
    names = sorted(os.listdir(shapes[2]))
    for name in names:
        shutil.copy(Path(shapes[2]) / name, folder)
    (folder / names[0]).write_bytes(b"")
    spoilt = (f"spoilt_{runs.folder.name}", shapes[1], str(folder))
    opts = ("DATASETS.COCO_FORMAT", str((spoilt,)), "DATASETS.TRAIN", str(spoilt[:1]))
    runs.start(*LAUNCH, *opts, starter=forking)
    assert runs.wait() == 2
    line = runs.sentence()
    assert line.startswith("error: ") and names[0] in line


@pytest.mark.e2e
def test_a_full_disk_is_one_sentence(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.json").symlink_to("/dev/full")
    opts = ("OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1")
    assert main(["--config-file", str(config), *opts]) == 2
    out, err = capsys.readouterr()
    (line,) = [x for x in err.splitlines() if "Warning" not in x and not x.startswith(" ")]
    assert line.startswith("error: there is no space left on the device")
    assert "Traceback" not in out + err


@starts_processes
@needs_loopback
def test_a_stopped_task_ends_the_others(stopped: Runs) -> None:
    assert stopped.wait(0) == 2
    assert stopped.sentence(0).startswith("error: another process did not answer for 10 s (--dist-")
    last = max((stopped.output / name).stat().st_mtime for name in ("log.txt", "last_checkpoint"))
    assert (stopped.folder / "stderr_0").stat().st_mtime - last < 10 + 15
