"""``python -m deqfusion``: the command line of `deqfusion.cli`."""

from __future__ import annotations

from deqfusion.cli import run

run()
