"""Repeat a training step that was not finite, and name what made it so.

A training writes such a step to OUTPUT_DIR/nonfinite, see SOLVER.ON_NONFINITE. The teacher's files
and the annotations must be where the run's config says.

Exit code: 0 if the fault shows again, 1 if the step is finite here, 2 if the file cannot be used.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from distill.doctor.replay import Replay, replay
from distill.errors import DistillError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reproducer", help="a file of OUTPUT_DIR/nonfinite")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args(argv)
    try:
        result = replay(args.reproducer, args.opts)
    except DistillError as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return 2
    show(result, console())
    return 0 if result.reproduced else 1


def console() -> Console:
    """Prints what a file says as it is: no markup, no line broken."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def show(result: Replay, console: Console) -> None:
    console.print(f"The run said: {result.what}")
    table = Table("loss", "in the run", "here")
    for name in {**result.saved_losses, **result.losses}:
        values = (result.saved_losses.get(name), result.losses.get(name))
        table.add_row(name, *("" if v is None else f"{v:.6g}" for v in values))
    console.print(table)
    if result.error:
        console.print(f"detectron2 stopped the forward: {result.error}")
    if not result.reproduced:
        console.print("Everything is finite here.")
    for k, source in enumerate(result.sources[:10]):
        console.print(f"{'first not finite' if k == 0 else 'then'}: {source}")
    if len(result.sources) > 10:
        console.print(f"and {len(result.sources) - 10} more")


if __name__ == "__main__":
    sys.exit(main())
