"""Rank of each process, and the process group that they form."""

import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
from detectron2.utils import comm
from torch import distributed as dist

from ..errors import ConfigError, DistillError
from .termination import PORT_TAKEN


@dataclass(frozen=True)
class ProcessInfo:
    """Rank of a process among ``world`` processes, ``local_size`` of them on each machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_size: int = 1
    url: str = ""  # init_method of init_process_group; empty: there is only one process

    def join(self, device: str, timeout: timedelta) -> None:
        """Form a process group with the other processes.

        Args:
            device: ``MODEL.DEVICE``; CPUs communicate by gloo, GPUs by NCCL.
            timeout: for this and for every later exchange.

        Raises:
            DistillError: rank 0 does not answer at ``url``, or there are too few GPUs.
            RuntimeError: torch's own errors, which `termination.user_error` translates.
        """
        if not self.url:
            return
        cuda = device.startswith("cuda")
        if cuda:
            visible = torch.cuda.device_count()
            if visible > 1:  # SLURM may give each task one GPU, which is the only visible one
                check_gpus(device, self.local_size)
            torch.cuda.set_device(self.local_rank % visible)
        if self.rank and self.url.startswith("tcp://"):
            await_first(self.url, timeout)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=self.url,
            rank=self.rank,
            world_size=self.world,
            timeout=timeout,
        )
        comm.create_local_process_group(self.local_size)


def check_gpus(device: str, processes: int) -> None:
    """Raise a ConfigError if this machine has fewer GPUs than processes that need one."""
    visible = torch.cuda.device_count()
    if device.startswith("cuda") and visible < processes:
        raise ConfigError(
            f"This machine has {visible} GPUs for {processes} processes; start one process per "
            "GPU (--num-gpus, --nproc-per-node or --ntasks-per-node)."
        )


def await_first(url: str, timeout: timedelta) -> None:
    """Return when rank 0 listens. torch would print many lines before it gives up.

    Raises:
        DistillError: rank 0 does not listen within ``timeout``.
    """
    where, seconds = urlsplit(url), timeout.total_seconds()
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((where.hostname, where.port), timeout=seconds).close()
            return
        except OSError as e:
            if time.monotonic() > deadline:
                raise DistillError(
                    f"rank 0 does not answer at {url} within {seconds:.0f} s (--dist-timeout): "
                    f"{e.strerror or e}; start all of them with the same --dist-url and "
                    "--num-machines, on connected machines."
                ) from e
            time.sleep(0.2)


def from_arguments(num_gpus: int, num_machines: int, machine_rank: int, url: str) -> ProcessInfo:
    """Return the first process of this machine, given detectron2's arguments.

    Args:
        num_gpus: processes per machine, also on CPUs.
        num_machines, machine_rank: number of machines, and the rank of this one.
        url: tcp://HOST:PORT of machine 0, or "auto" for a free port of this machine.

    Raises:
        ConfigError: the arguments contradict each other, or the port is taken.
    """
    if not 0 <= machine_rank < num_machines:
        raise ConfigError(
            f"--machine-rank is {machine_rank}; with --num-machines {num_machines} it must be one "
            f"of 0 to {num_machines - 1}."
        )
    if url == "auto" and num_machines > 1:
        raise ConfigError("--dist-url auto is for one machine; give tcp://HOST:PORT of machine 0.")
    port = 0 if url == "auto" else port_of(url)
    if machine_rank == 0:  # rank 0 will listen there
        try:
            with socket.create_server(("", port)) as server:
                port = server.getsockname()[1]
        except OSError as e:
            raise ConfigError(PORT_TAKEN.format(port)) from e
    url = f"tcp://127.0.0.1:{port}" if url == "auto" else url
    return ProcessInfo(machine_rank * num_gpus, num_machines * num_gpus, 0, num_gpus, url)


def port_of(url: str) -> int:
    """Return the port of tcp://HOST:PORT.

    Raises:
        ConfigError: ``url`` has another form.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.port
    except ValueError:  # the port is not a number
        pass
    raise ConfigError(f"--dist-url is '{url}'; it must be tcp://HOST:PORT, or auto.")


def from_torchrun(env: Mapping[str, str]) -> ProcessInfo:
    """Return the rank that ``torchrun`` gave this process."""
    return ProcessInfo(
        rank=int(env["RANK"]),
        world=int(env["WORLD_SIZE"]),
        local_rank=int(env["LOCAL_RANK"]),
        local_size=int(env["LOCAL_WORLD_SIZE"]),
        url="env://",
    )


def from_slurm(env: Mapping[str, str]) -> ProcessInfo | None:
    """Return the rank that ``srun`` gave this process, or None if it is the only process.

    Only the variables of the job step are used. In a batch script, SLURM_NTASKS counts tasks that
    are not started yet. By default the processes meet at the step's first host, and the port is
    computed from the numbers of job and step. ``MASTER_ADDR`` and ``MASTER_PORT`` override these.

    Raises:
        ConfigError: a variable is missing or contradicts the others.
    """
    if _number(env, "SLURM_STEP_NUM_TASKS", "1") < 2:
        return None
    world, rank, local_rank = (
        _number(env, key) for key in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    )
    sizes = tasks_per_node(_variable(env, "SLURM_STEP_TASKS_PER_NODE"))
    if sum(sizes) != world or not 0 <= rank < world:
        raise ConfigError(
            f"SLURM's variables contradict each other: SLURM_PROCID {rank}, SLURM_STEP_NUM_TASKS "
            f"{world}, nodes of {sizes} tasks; start with srun, and do not set them yourself."
        )
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"SLURM's nodes have {sizes} tasks; give each the same number (srun --ntasks-per-node)."
        )
    if rank % sizes[0] != local_rank:
        raise ConfigError(
            f"SLURM_PROCID {rank} has SLURM_LOCALID {local_rank} on nodes of {sizes[0]} tasks; "
            "number the tasks node by node (srun --distribution=block)."
        )
    host = env.get("MASTER_ADDR") or first_host(_variable(env, "SLURM_STEP_NODELIST"))
    if "MASTER_PORT" in env:
        port = _number(env, "MASTER_PORT")
    else:  # below the range of ports that systems assign
        job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID", "0")
        port = 10000 + (31 * job + step) % 20000
    return ProcessInfo(rank, world, local_rank, sizes[0], f"tcp://{host}:{port}")


def first_host(nodes: str) -> str:
    """Return the first name of a SLURM list: ``gpu[02-04,07],cpu1`` gives gpu02.

    Raises:
        ConfigError: ``nodes`` is not such a list.
    """
    name = r"[A-Za-z0-9_.-]*"
    found = re.match(rf"({name})(?:\[(\d+)[^\[\]]*\]({name}))?(?:,|$)", nodes)
    if not found or not found[0].strip(","):
        raise ConfigError(
            f"SLURM_STEP_NODELIST is '{nodes}', which has no host name; set MASTER_ADDR."
        )
    return "".join(x or "" for x in found.groups())


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's short form: ``2(x2),1`` gives [2, 2, 1].

    Raises:
        ConfigError: ``text`` does not have this form.
    """
    sizes: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE is '{text}'; it should read like 2(x3) or 2(x2),1."
            )
        sizes += [int(found[1])] * int(found[2] or 1)
    return sizes


def _variable(env: Mapping[str, str], key: str, default: str | None = None) -> str:
    value = env.get(key, default)
    if not value:
        raise ConfigError(
            f"{key} is not set although srun started several tasks; start with srun, or with "
            "--num-gpus and --num-machines."
        )
    return value


def _number(env: Mapping[str, str], key: str, default: str | None = None) -> int:
    value = _variable(env, key, default)
    if not value.isdecimal():
        raise ConfigError(f"{key} is '{value}'; it must be a whole number.")
    return int(value)
