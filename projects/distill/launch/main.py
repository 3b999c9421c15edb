"""Train or evaluate a plain or distilled detectron2 model, in one process or several."""

import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_start_method, set_start_method

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException, start_processes

from ..checkpoint.load import readable
from ..checkpoint.save import damage, resumable
from ..config import find_config, load_config
from ..engine import Trainer, evaluate, evaluate_finished, finish_config
from ..engine.hooks import BestCheckpointHook
from ..errors import ConfigError, DistillError
from ..utils.arguments import CommandParser, add_config_arguments, at_least
from .process_group import ProcessInfo, check_gpus, from_arguments, from_slurm, from_torchrun
from .termination import (
    GRACE_PERIOD_S,
    exit_on_signals,
    exit_process,
    quiet_libraries,
    report_error,
    resume_hint,
    run_command,
    signals_deferred,
    user_error,
)

logger = logging.getLogger(__name__)


def train(cfg: CfgNode, args: Namespace, finished: str | None, trainer: type[Trainer]) -> int:
    """Be one process of a training, an evaluation or a check.

    Args:
        cfg, finished: see :func:`configure`.
        args: see :func:`add_arguments`.
        trainer: the class that trains and evaluates.

    Returns:
        The exit code.
    """
    if args.doctor:
        from ..doctor import run_doctor

        return run_doctor(cfg)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="distill")
    default_setup(cfg, args)
    if args.eval_only:
        evaluate(cfg, trainer=trainer)
    elif finished:
        logger.info("%s is trained already; evaluating %s", cfg.OUTPUT_DIR, finished)
        evaluate_finished(cfg, finished, trainer)
    else:
        training = trainer(cfg)
        training.resume_or_load(resume=args.resume)
        training.train()
    return 0


def configure(args: Namespace) -> tuple[CfgNode, str | None]:
    """Return the config, and the final checkpoint if --resume is given and the run has finished.

    Raises:
        ConfigError, DataError, WeightsError: one sentence that names what to change.
    """
    schedule = ["SOLVER.SCHEDULE", args.schedule] if args.schedule else []
    cfg = load_config(args.config_file, [*schedule, *args.opts])
    finished = finished_checkpoint(cfg) if args.resume and not args.doctor else None
    if args.resume and resumable(cfg.OUTPUT_DIR):  # the checkpoint has the backbone's weights
        cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, ""
    training = args.doctor or not (args.eval_only or finished)
    return finish_config(cfg, training=training), finished


def finished_checkpoint(cfg: CfgNode) -> str | None:
    """Return the final checkpoint of a finished run, which needs no teacher any more.

    A run has finished at ``SOLVER.MAX_ITER``, or if its ``SOLVER.PATIENCE`` ran out. A higher value
    of the one that ended it continues the training.

    Returns None if there is no such checkpoint or if it is corrupt. Training then continues from
    the one before it.
    """
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if not os.path.isfile(path) or damage(path):
        return None
    with readable(path, "--resume"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        best = saved.get("trainer", {}).get("hooks", {}).get("BestCheckpointHook", {})
        ended = BestCheckpointHook.ran_out(best, cfg.SOLVER.PATIENCE, cfg.TEST.BEST_METRIC)
        return path if ended or saved["iteration"] + 1 >= cfg.SOLVER.MAX_ITER else None


def add_arguments(parser: ArgumentParser) -> None:
    """Add detectron2's arguments, ``--doctor`` and ``--dist-timeout``."""
    stock = default_argument_parser()
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS instead of training"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument(
        "--machine-rank", type=int, default=0, help="number of this machine, from 0"
    )
    parser.add_argument(
        "--dist-url",
        default=stock.get_default("dist_url"),
        metavar="URL",
        help="where processes meet: tcp://HOST:PORT of machine 0, or auto on one machine",
    )
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="check a training on two batches instead of running it",
    )
    parser.add_argument(
        "--schedule",
        metavar="{1x,2x,3x}",
        help="train for 1, 2 or 3 times the iterations of the config file, with the steps of the "
        "learning rate as in detectron2's model zoo (key SOLVER.SCHEDULE)",
    )
    parser.add_argument(
        "--dist-timeout",
        type=at_least(1),
        default=int(DEFAULT_TIMEOUT.total_seconds()),
        metavar="SECONDS",
        help="how long a process waits for another one before it gives up (default: %(default)s)",
    )


def argument_parser() -> CommandParser:
    """Parser of :func:`main`, for a script that adds arguments of its own and calls :func:`run`."""
    parser = CommandParser(description=__doc__)
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None, trainer: type[Trainer] = Trainer) -> int:
    """Train with detectron2's command line, also under ``torchrun`` and ``srun``.

    Args:
        argv: arguments; by default, those of this process.
        trainer: a subclass of :class:`Trainer` to use instead.

    Returns:
        The exit code, see :func:`run_command`.
    """
    return run_command(lambda: run(argument_parser().parse_args(argv), trainer))


def run(args: Namespace, trainer: type[Trainer] = Trainer) -> int:
    """Start this machine's processes, or be the one that was started.

    SIGINT and SIGTERM end the process itself, with exit code 130 or 143.

    Returns:
        The exit code, 2 after one sentence that says what to change.
    """
    try:
        if args.config_file:  # detectron2 opens it, too
            args.config_file = find_config(args.config_file)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return _take_part(args, trainer, from_torchrun(os.environ))
        if args.num_gpus * args.num_machines > 1:
            return _start_members(args, trainer)
        return _take_part(args, trainer, from_slurm(os.environ) or ProcessInfo())
    except DistillError as e:
        return report_error(e)


def _start_members(args: Namespace, trainer: type[Trainer]) -> int:
    """Start this machine's processes, as detectron2's ``launch`` does; return the exit code."""
    cfg, _ = configure(args)  # its errors are printed once, here
    first = from_arguments(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    _check_doctor(args, first)
    check_gpus(cfg.MODEL.DEVICE, first.local_size)
    # torch warns of every process that it ends.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with exit_on_signals(lambda: resume_hint(_trained_folder(cfg, args)), GRACE_PERIOD_S):
        with signals_deferred():
            context = start_processes(
                _member, (args, trainer, first, get_start_method()), first.local_size, join=False
            )
        try:
            while not context.join():
                pass
        except ProcessExitedException as e:
            return _exit_code(e)
    return 0


def _member(
    local_rank: int, args: Namespace, trainer: type[Trainer], first: ProcessInfo, method: str
) -> None:
    quiet_libraries()
    # A spawned process would spawn its data workers too, which then import everything anew.
    set_start_method(method, force=True)
    process = replace(first, rank=first.rank + local_rank, local_rank=local_rank)
    _take_part(args, trainer, process, announce=False)


def _exit_code(ended: ProcessExitedException) -> int:
    """Return the exit code of the first process that failed; print a reason that it could not."""
    name = ended.signal_name or {130: "SIGINT", 143: "SIGTERM"}.get(ended.exit_code)
    if not name:
        return ended.exit_code
    why = {
        "SIGKILL": " (out of memory?)",
        "SIGABRT": " (by NCCL after --dist-timeout? its lines are above)",
    }
    return report_error(
        DistillError(
            f"the process with local rank {ended.error_index} was killed by {name}"
            f"{why.get(name, '')}; the others were stopped; continue with --resume."
        )
    )


def _take_part(
    args: Namespace, trainer: type[Trainer], process: ProcessInfo, announce: bool = True
) -> int:
    """Be one process: return the exit code if it is the only one, otherwise exit with it.

    Args:
        announce: print which signal ended it; otherwise its parent does.
    """
    folder = ""
    talks = announce and process.local_rank == 0
    with exit_on_signals((lambda: resume_hint(folder)) if talks else None):
        try:
            _check_doctor(args, process)
            cfg, finished = configure(args)
            process.join(cfg.MODEL.DEVICE, timedelta(seconds=args.dist_timeout))
            folder = _trained_folder(cfg, args)
            code = train(cfg, args, finished, trainer)
            comm.synchronize()  # no process ends while another one still needs it
        except Exception as e:
            if not process.url and not user_error(e):
                raise
            code = report_error(e, process.rank, process.local_rank)
        if process.url:  # gloo's threads can crash or block the interpreter's exit
            exit_process(code)
    return code


def _trained_folder(cfg: CfgNode, args: Namespace) -> str:
    """Return the folder of this command's checkpoints, "" if it writes no checkpoints."""
    return "" if args.eval_only or args.doctor else str(cfg.OUTPUT_DIR)


def _check_doctor(args: Namespace, process: ProcessInfo) -> None:
    if args.doctor and process.world > 1:
        raise ConfigError("--doctor runs in one process; start it without the others.")
