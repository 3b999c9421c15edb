"""Train or evaluate a plain or distilled detectron2 model.

python tools/train_net.py --config-file configs/quick/demo_distilled.yaml [KEY VALUE ...]
"""

import sys

from distill.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
