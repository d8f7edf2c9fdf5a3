"""What is no longer finite is refused where it arose."""

from __future__ import annotations

import pytest
import torch
import torchopt

import funcmlo as fm
from tests.programs import SGD


def test_what_is_no_longer_finite_is_named_where_it_arose() -> None:
    p = fm.Multilevel(
        fm.Level("y", lambda y, x: torch.sqrt(y - x).sum(), SGD, steps=1, response=fm.AID(fm.CG(3))),
        fm.Level("x", lambda x, y: (y**2).sum(), SGD),
    )
    state = p.init({"y": torch.ones(2), "x": torch.ones(2)})
    with pytest.raises(fm.NonFiniteError, match=r"level 'y': its parameters are no longer finite after 1 inner steps"):
        p.step(state, {})


def test_an_update_of_the_upper_level_that_overflows_is_refused() -> None:
    p = fm.Multilevel(
        fm.Level("y", lambda y, x: ((y - x) ** 2).sum(), SGD, response=fm.AID(fm.CG(3))),
        fm.Level("x", lambda x, y: 100 * y.sum(), torchopt.sgd(3e38)),
    )
    state = p.init({"y": torch.ones(2), "x": torch.ones(2)})
    with pytest.raises(fm.NonFiniteError, match=r"level 'x': its parameters are no longer finite after its update"):
        p.step(state, {})
    assert torch.isfinite(p.hypergradient(state, {}, of="x")).all()
