"""Every field of every estimator, solver and curvature refuses what has no meaning there, by name."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torchopt

import funcmlo as fm

SGD = torchopt.sgd(0.1)

VALID: dict[type, dict[str, object]] = {
    fm.CG: {"iterations": 3},
    fm.MINRES: {"iterations": 3},
    fm.GMRES: {"iterations": 3},
    fm.Neumann: {"iterations": 3, "scale": 0.1},
    fm.Nystrom: {"rank": 3},
    fm.NormalEquations: {"solver": fm.CG(3)},
    fm.GradientSteps: {"optimizer": SGD, "steps": 3},
    fm.Direct: {},
    fm.Identity: {},
    fm.OptimizerIdentity: {},
    fm.Hessian: {},
    fm.Damped: {"damping": 0.1},
    fm.Resampled: {},
    fm.GaussNewton: {"outputs": lambda y: y, "loss": lambda f: f.sum()},
    fm.Checkpoint: {},
    fm.ITD: {},
    fm.AID: {"solver": fm.CG(3)},
    fm.FiniteDifference: {},
    fm.SAMA: {},
    fm.ForwardGradient: {"samples": 3},
    fm.PerturbedSolve: {"samples": 3},
    fm.Penalty: {"sigma": 0.1},
}
WRONG: list[object] = [
    "a",
    object(),
    [1],
    {"a": 1},
    -1,
    -0.5,
    float("nan"),
    float("inf"),
    1.5,
    0,
    True,
    fm.CG,
    torch.ones(2),
]


def meaningful(kind: type, field: str, value: object) -> bool:
    """What among the wrong values has a meaning in a field."""
    positive = isinstance(value, float) and value == 1.5
    if field in {"tol", "damping"} and kind is not fm.Damped:
        return positive or (type(value) is int and value == 0 and (kind, field) != (fm.Nystrom, "damping"))
    if field in {"scale", "sigma", "damping"}:
        return positive
    if field == "seed":
        return isinstance(value, int) and not isinstance(value, bool)
    if field in {"throw", "mixed", "offload", "warm_start", "central"}:
        return value is True
    if field in {"preconditioner", "optimizer"}:  # any map, and anything with an optimizer's two functions
        return callable(value) and not isinstance(value, type)
    return False


CASES = [
    (kind, f.name, value)
    for kind, given in VALID.items()
    for f in dataclasses.fields(kind)
    if f.init
    for value in WRONG
    if not meaningful(kind, f.name, value)
]


@pytest.mark.parametrize(("kind", "field", "value"), CASES, ids=lambda x: getattr(x, "__name__", None) or repr(x)[:12])
def test_a_field_without_a_meaning_is_refused_by_name(kind: type, field: str, value: object) -> None:
    given = {**VALID[kind], field: value}
    if kind is fm.GaussNewton and isinstance(value, type):
        return  # a class can be called: it is a function of its arguments
    with pytest.raises(fm.DefinitionError) as caught:
        kind(**given)
    message = str(caught.value)
    assert re.search(rf"{kind.__name__}\b", message), message
    assert field in message, message
    assert "expected" in message, message


@pytest.mark.parametrize("kind", VALID, ids=lambda kind: kind.__name__)
def test_what_is_meant_is_taken(kind: type) -> None:
    made = kind(**VALID[kind])
    assert dataclasses.replace(made) == made
