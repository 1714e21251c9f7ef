"""`python -m qftlab_course COMMAND`: as `python -m qftlab`, also in a checkout that is not installed."""

from __future__ import annotations

import sys

from qftlab.cli import main
from qftlab.commands import COMMANDS as OURS
from qftlab_course.commands import COMMANDS

if __name__ == "__main__":
    OURS.update(COMMANDS)
    sys.exit(main())
