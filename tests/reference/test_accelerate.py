"""One step of an accelerator against the equation it stands for."""

import pytest
import torch

from deqfusion.reference.accelerate import Anderson, Picard

BLOCKS, ROWS, DIM = 2, 3, 12


@pytest.mark.parametrize("mixing", [1.0, 0.7, 0.2])
@pytest.mark.parametrize("memory", [1, 2, 4])
def test_anderson_mixes_evaluations_and_iterates(memory, mixing):
    """The weights are those of least ||sum a g|| that sum to 1, over the last `memory`."""
    torch.manual_seed(0)
    anderson = Anderson(memory, 0.0, True, mixing)
    history = []
    for _ in range(6):
        f, z = torch.randn(2, BLOCKS, ROWS, DIM, dtype=torch.float64)
        got = anderson.propose(z, f, f - z)
        history = [*history, (f, z)][-memory:]
        fs, zs = (torch.stack(parts, -1) for parts in zip(*history, strict=True))
        gs = fs - zs
        # The last weight is 1 minus the others.
        differences, last = gs[..., :-1] - gs[..., -1:], gs[..., -1:]
        free = torch.linalg.lstsq(differences, -last).solution
        a = torch.cat((free, 1 - free.sum(-2, keepdim=True)), -2)
        expected = mixing * fs @ a + (1 - mixing) * zs @ a
        torch.testing.assert_close(got, expected.squeeze(-1))


def test_picard_steps_part_of_the_way():
    f, z = torch.randn(2, BLOCKS, ROWS, DIM)
    for damping in (1.0, 0.3):
        torch.testing.assert_close(Picard(damping).propose(z, f, f - z), z + damping * (f - z))
