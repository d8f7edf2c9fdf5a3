"""The fold: products where they are needed, cotangents added where paths meet."""

from __future__ import annotations

import warnings

import pytest
import torch

import funcmlo as fm
from funcmlo.fold import total_gradient
from funcmlo.graph import Graph
from funcmlo.problem import Problem
from funcmlo.unroll import run
from tests.programs import BATCHES, SGD, program, start


def test_a_level_without_parameters_is_nothing_to_warn_of() -> None:
    p = fm.Multilevel(
        fm.Level("y", lambda y, x: (x**2).sum(), SGD, response=fm.AID(fm.CG(3))),
        fm.Level("x", lambda x, y: (x**2).sum(), SGD),
    )
    state = p.init({"y": {}, "x": torch.ones(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.step(state, {})
        assert torch.equal(p.hypergradient(state, {}, of="x"), torch.full((2,), 2.0))


def test_no_product_is_spent_where_nothing_can_come_through() -> None:
    low = fm.Level("y", lambda y, x: ((y - x) ** 2).sum(), SGD, response=fm.AID(fm.CG(3)))
    params = {"y": torch.zeros(2), "x": torch.ones(2)}
    p = fm.Multilevel(low, fm.Level("x", lambda x, y: (x**2).sum(), SGD))
    with pytest.warns(fm.FuncmloWarning, match="does not depend on it"):
        assert p.hypergradient(p.init(params), {}, of="x", with_stats=True)[1] == {}
    with pytest.warns(fm.FuncmloWarning, match="no path"):
        p = fm.Multilevel(replace_loss(low, lambda y: (y**2).sum()), fm.Level("x", lambda x, y: (x * (y + 1)).sum(), SGD))
    assert p.hypergradient(p.init(params), {}, of="x", with_stats=True)[1] == {}


def replace_loss(level: fm.Level, loss: object) -> fm.Level:
    return fm.Level(level.name, loss, level.optimizer, steps=level.steps, response=level.response)


def test_cotangents_are_folded_from_the_top_down_and_added_where_paths_meet() -> None:
    # a* = 2c, b* = 3a + 5c and C = 7b + 11a + 13c: dC/dc = 13 + 7 (5 + 3·2) + 11·2 = 112.
    aid = fm.AID(fm.CG(3))
    levels = (
        fm.Level("a", lambda a, c: (a - 2 * c) ** 2 / 2, SGD, response=aid),
        fm.Level("b", lambda b, a, c: (b - 3 * a - 5 * c) ** 2 / 2, SGD, response=aid),
        fm.Level("c", lambda c, a, b: 7 * b + 11 * a + 13 * c, SGD),
    )
    graph = Graph.of(levels)
    params = {"a": torch.tensor(2.0).double(), "b": torch.tensor(11.0).double(), "c": torch.tensor(1.0).double()}
    problems = {level.name: Problem(level, lambda t: None, seed=0, first=0) for level in levels}
    below = {
        n: (aid, run(problems[n], (params[n], ()), {k: params[k] for k in problems[n].level.reads_levels}, 0).solved)
        for n in "ab"
    }
    with torch.no_grad():
        folded = total_gradient(graph, problems["c"], params, below, {"a": None, "b": None})
    assert torch.allclose(folded.gradient, torch.tensor(112.0).double(), rtol=1e-14)
    assert set(folded.stats) == {"a", "b"}


def test_an_estimator_that_answers_for_more_than_the_inputs_is_refused() -> None:
    class More(fm.BestResponse):
        def vjp(self, solved, cotangent, state):
            return {**solved.inputs, "z": cotangent}, state, fm.Stats()

    p = program(More())
    with pytest.raises(fm.EstimatorError, match=r"returned cotangents for x, z; expected one for every input: x"):
        p.step(p.init(start()), {"y": BATCHES[0]})
