"""``python -m hetlora`` is the command ``hetlora``."""

import sys

from hetlora.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
