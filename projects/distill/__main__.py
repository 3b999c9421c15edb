"""``python -m distill``, which is the command ``distill``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
