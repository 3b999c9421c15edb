"""Examine a training before it costs days: weights, taps, losses, the teacher, the cost.

python tools/doctor.py --config-file configs/quick/demo_distilled.yaml [KEY VALUE ...]
"""

import sys

from distill.doctor import main

if __name__ == "__main__":
    sys.exit(main())
