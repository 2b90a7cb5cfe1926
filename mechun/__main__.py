"""`python -m mechun` is the command `mechun`; so `accelerate launch -m mechun` can start it on many processes."""

import sys

from mechun.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
