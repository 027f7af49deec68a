"""Run the command line as ``python -m neurms``."""

from neurms.cli import main

if __name__ == "__main__":
    main()
