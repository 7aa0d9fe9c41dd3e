"""Learning-rate schedules, as a factor that epoch and step alone decide: nothing to resume."""

from __future__ import annotations

import math

from .recipe import Config


def rate_factor(epoch: int, step: int, steps: int, config: Config) -> float:
    """Return the factor on the learning rate for one step.

    Args:
        epoch, step: from 0.
        steps: of the epoch.
        config: `schedule`, `warmup`, `epochs`, `step_epochs` and `step_factor`.

    Returns:
        1 with schedule "constant"; "cosine" falls from 1 to 0 between warm-up and the last epoch,
        "step" by `step_factor` every `step_epochs` epochs. In the first `warmup` epochs that is
        multiplied by the share of them that has passed.
    """
    done, warmup = epoch + step / steps, config["warmup"]
    rise = min(1.0, (done + 1 / steps) / warmup) if warmup else 1.0
    if config["schedule"] == "cosine":
        share = (done - warmup) / max(config["epochs"] - warmup, 1e-12)
        return rise * 0.5 * (1.0 + math.cos(math.pi * min(max(share, 0.0), 1.0)))
    if config["schedule"] == "step":
        return rise * config["step_factor"] ** (epoch // config["step_epochs"])
    return rise
