"""`python -m offmoe`."""

import sys

from offmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
