"""`python -m offmoe`."""

import sys

from offmoe.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
