"""This library's estimators, each as a program of two levels."""

from __future__ import annotations

from collections.abc import Callable

import torchopt
from torch import Tensor

import funcmlo as fm
from paper_repro.peers_correctness.methods import Method
from paper_repro.peers_correctness.problem import Question


def hypergradient(question: Question, response: fm.BestResponse) -> Tensor:
    """Return dF/dx of the program, its inner loop run from the question's start."""
    optimizer = {
        "sgd": lambda: torchopt.sgd(question.rate),
        "momentum": lambda: torchopt.sgd(question.rate, momentum=0.9),
        "adam": lambda: torchopt.adam(question.rate),
    }[question.optimizer]()
    program = fm.Multilevel(
        fm.Level("y", question.inner, optimizer, steps=question.steps, response=response),
        fm.Level("x", question.outer, torchopt.sgd(1.0), reads={"y": "y"}),
    )
    state = program.init({"y": question.start, "x": question.x})
    gradient: Tensor = program.hypergradient(state, {}, of="x")
    return gradient


def _with(response: Callable[[Question], fm.BestResponse]) -> Callable[[Question], Tensor]:
    return lambda question: hypergradient(question, response(question))


METHODS = (
    Method("ITD", "unrolled", _with(lambda q: fm.ITD()), uses_rate=True),
    Method("AID, CG", "implicit", _with(lambda q: fm.AID(fm.CG(4 * q.size, tol=1e-12)))),
    Method("AID, Neumann", "implicit", _with(lambda q: fm.AID(fm.Neumann(q.terms, scale=1 / q.curvature)))),
    Method("AID, MINRES", "implicit", _with(lambda q: fm.AID(fm.MINRES(4 * q.size, tol=1e-12)))),
    Method("AID, GMRES", "implicit", _with(lambda q: fm.AID(fm.GMRES(4 * q.size, tol=1e-12)))),
    Method("AID, direct", "implicit", _with(lambda q: fm.AID(fm.Direct()))),
    Method("finite difference", "identity", _with(lambda q: fm.FiniteDifference()), difference=True),
)
