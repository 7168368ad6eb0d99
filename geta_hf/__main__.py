"""`python -m geta_hf` is the command `geta-hf`."""

import sys

from geta_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
