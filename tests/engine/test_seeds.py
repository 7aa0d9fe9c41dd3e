"""Seeds: what two runs and their splits draw has nothing in common."""

import itertools

import torch

from deqfusion.engine import read_model, seed_of, train
from deqfusion.engine.config import read_run
from deqfusion.engine.runs import RunDirectory
from tests.engine.problem import Problem


class Twice(Problem):
    """The same rows as two splits: only seed and split tell their models apart."""

    def repeats(self, config):
        return 2


def test_every_seed_and_split_has_a_seed_of_its_own():
    pairs = itertools.product(range(20), range(20))
    seeds = {seed_of({"seed": seed, "split": split}) for seed, split in pairs}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert 0 <= seed_of({"seed": 2**32 - 1, "split": 9999}) < 2**32
    assert seed_of({"seed": 7}) == 7


def test_a_split_of_a_seed_is_no_split_of_its_neighbour(tmp_path):
    heads = {}
    for seed in (0, 1):
        out = tmp_path / str(seed)
        train(Twice(), tmp_path, out, {"dim": 8, "epochs": 1, "seed": seed})
        for split in (0, 1):
            folder = out / f"split_00{split}"
            model = read_model(Twice(), RunDirectory(folder), read_run(folder, Twice()))
            heads[seed, split] = model.head.weight
    for one, other in itertools.combinations(heads.values(), 2):
        assert not torch.equal(one, other)
