"""`python -m deqfusion.bench ...` is `deqfusion bench ...`."""

import sys

from deqfusion.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
