"""Tuning for the device at hand: the least time to a verified residual.

    example    a layer's solves on example features, and what is true of them in float64
    search     which choices are tried, verified and timed, within a budget of seconds
    api        the whole of it as one function; result: what that returns
    predict    the same by the cost model alone, for a device that is not there
    command    `deqfusion autotune`

What was found is kept by `deqfusion.kernels.tuning`, where the operators look it up. It is not
`deqfusion/autotune.py`, as the name `deqfusion.autotune` is the function's.
"""

from deqfusion.tuning.api import autotune
from deqfusion.tuning.result import Trial, Tuned

__all__ = ["Trial", "Tuned", "autotune"]
