"""``python -m deqfusion``: the command line of `deqfusion.cli`."""

from __future__ import annotations

import sys

from deqfusion.cli import main

sys.exit(main())
