"""``python -m pyrodiff``: the command line."""

import sys

from pyrodiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
