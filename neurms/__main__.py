"""Run the command line as ``python -m neurms``."""

import sys

from neurms.cli import main

if __name__ == "__main__":
    sys.exit(main())
