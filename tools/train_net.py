"""Train or evaluate a plain or distilled detectron2 model.

    python tools/train_net.py --config-file FILE [KEY VALUE ...]

`distill train` does the same. Copy this file to change the training, as detectron2's own script:
the trainer is a subclass of detectron2's DefaultTrainer.
"""

import sys

from distill.engine import Trainer
from distill.launch.main import main


class MyTrainer(Trainer):
    """Override what your project changes, for example ``build_evaluator`` or ``build_hooks``."""


if __name__ == "__main__":
    sys.exit(main(trainer=MyTrainer))
