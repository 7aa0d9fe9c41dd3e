"""Oracles that the tests hold the library against, none of which uses the library's own code.

`golden` reads the golden vectors, `textbook` writes the cell out in plain PyTorch, and `dense`
solves the implicit gradient with dense Jacobians. They import torch and numpy only, so an error
in the solvers, the operators or the reference implementation cannot hide in its own check.
"""

from deqfusion.testing.dense import (
    dense_adjoint,
    dense_jacobian,
    implicit_gradient,
    spectral_radius,
)
from deqfusion.testing.golden import GoldenCase, find_golden, golden_files, load_golden
from deqfusion.testing.textbook import CellOptions, inject, textbook_cell

__all__ = [
    "CellOptions",
    "GoldenCase",
    "dense_adjoint",
    "dense_jacobian",
    "find_golden",
    "golden_files",
    "implicit_gradient",
    "inject",
    "load_golden",
    "spectral_radius",
    "textbook_cell",
]
