"""Dictionary keys that are equal only if the values are the same."""

from dataclasses import dataclass

import numpy as np
import torch

import distflash as df
from distflash.exact import code, exact


@dataclass(frozen=True)
class Sloped(df.Mask):
    """A mask with a float, whose equality takes 1 and True for it."""

    slope: float

    def ends(self, positions, seq_len):
        raise NotImplementedError


class Plain:
    """Neither a dataclass nor with a repr of its own: that would be its address."""


class Other:
    """As `Plain`."""


SLOPES = [1, 1.0, True, 0.0, -0.0, float("nan")]
DIFFERENT = [
    *(Sloped(slope) for slope in SLOPES),
    *(df.Causal() & Sloped(slope) for slope in SLOPES),
    *SLOPES,
    None,
    "1",
    (1,),
    (1.0,),
    (True,),
    torch.float32,
    torch.float64,
    df.Window(1),
    df.Documents([0, 1, 2]),
    df.kernels.Reference(),
    Plain(),
    Other(),
]


def test_different_values_differ():
    assert len(set(map(exact, DIFFERENT))) == len(set(map(code, DIFFERENT))) == len(DIFFERENT)


def test_same_values_are_same():
    pairs = [
        (float("nan"), -float("nan")),
        (Plain(), Plain()),
        (np.int64(3), 3),
        (df.Documents([0, 1, 2]), df.Documents(torch.tensor([0, 1, 2]))),
        (df.kernels.Reference(), df.kernels.Reference()),
    ]
    for one, other in pairs:
        assert exact(one) == exact(other) and code(one) == code(other)


def test_codes_fit_an_int64():
    values = [*DIFFERENT, 2**63 - 1, 2**63, -1, -(2**80)]
    assert all(-(2**63) <= code(value) < 2**63 for value in values)
    assert (code(5), code(2**63 - 1)) == (5, 2**63 - 1)  # as they are, for the words of an error
