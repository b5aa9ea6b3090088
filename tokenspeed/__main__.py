# SPDX-License-Identifier: MIT
"""`python -m tokenspeed` and the `tokenspeed` command. Knows the subcommands' names only."""

import sys

from tokenspeed.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
