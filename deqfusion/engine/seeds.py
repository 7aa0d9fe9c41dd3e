"""Seeds of what is drawn at random, each of its own stream."""

from __future__ import annotations

import numpy as np

from .recipe import Config


def mixed(*numbers: int) -> int:
    """Return a seed, 0 to 2**32 - 1, of some whole numbers >= 0, such as a seed and an epoch.

    `SeedSequence` mixes them, so that neighbouring numbers share nothing: with a sum, the second
    split of seed 0 would be the first one of seed 1, and seeds no repetitions of an experiment.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_of(config: Config) -> int:
    """Return the seed of a run, or that of one of its splits."""
    return mixed(config["seed"], config["split"]) if "split" in config else int(config["seed"])
