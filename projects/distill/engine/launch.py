"""The command line: one process or several."""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from ..config import validate_config
from ..data.datasets import register_coco_format
from ..errors import DistillError
from ..weights import readable
from .trainer import Trainer, evaluate, setup_config

logger = logging.getLogger(__name__)


def run(args: Namespace) -> Any:
    """One process of a training or evaluation."""
    cfg = setup_config(args.config_file, args.opts, training=False)
    finished = finished_checkpoint(cfg) if args.resume else None
    if not args.eval_only and not finished:
        register_coco_format(cfg)
        validate_config(cfg)
    # It remarks on a CUDA toolkit without a GPU; stderr is for our one line.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="distill")
    default_setup(cfg, args)
    if args.eval_only:
        return evaluate(cfg)
    if finished:
        logger.info("%s is trained already; evaluating %s", cfg.OUTPUT_DIR, finished)
        return evaluate(cfg, finished)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def finished_checkpoint(cfg: CfgNode) -> str | None:
    """The final checkpoint of a finished run; it needs no teacher any more."""
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if not os.path.isfile(path):
        return None
    with readable(path, "--resume"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    return path if saved.get("iteration", -1) + 1 >= cfg.SOLVER.MAX_ITER else None


def main(argv: Sequence[str] | None = None) -> int:
    """``train_net.py``: detectron2's command line, also under ``torchrun``.

    Returns:
        The exit code: 0, or 2 after one sentence that says what to change.
    """
    args = default_argument_parser().parse_args(argv)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _join_torchrun()
            _run_or_exit(args)
        else:
            launch(
                _run_or_exit,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
    except SystemExit as e:
        return int(e.code or 0)
    except ProcessExitedException as e:  # one of several processes ended so
        return e.exit_code
    return 0


def _run_or_exit(args: Namespace) -> None:
    try:
        run(args)
        comm.synchronize()  # nobody leaves while another process still talks to it
    except DistillError as e:
        if comm.get_local_rank() == 0:  # all processes find the same
            print("error:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():  # gloo's threads would abort the interpreter's exit
            torch.distributed.destroy_process_group()


def _join_torchrun() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
