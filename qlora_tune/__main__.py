"""`python -m qlora_tune`."""

import sys

from qlora_tune.cli import main

if __name__ == "__main__":
    sys.exit(main())
