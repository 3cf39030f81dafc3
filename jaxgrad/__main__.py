"""`python -m jaxgrad` is the `jaxgrad` command."""

import sys

from jaxgrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
