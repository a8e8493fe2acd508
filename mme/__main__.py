"""``python -m mme`` is the same as the console script ``mme``."""

from __future__ import annotations

import sys

from mme.cli import main

if __name__ == "__main__":
    sys.exit(main())
