"""`python -m qftlab COMMAND`: every stage without a notebook."""

from __future__ import annotations

import sys

from qftlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
