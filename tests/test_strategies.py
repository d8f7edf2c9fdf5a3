"""Strategies and code: values are written to the bit, failing examples are small and their text makes them again."""

from __future__ import annotations

import ast
import importlib
import math
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchopt
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torchopt.base import GradientTransformation

import funcmlo as fm
from funcmlo import _tree, optim
from funcmlo.operators import ravel, unravel
from funcmlo.testing import hierarchy, strategies
from funcmlo.testing.by_hand import solved
from funcmlo.testing.known import Bilevel, Known
from funcmlo.testing.optimizers import OPTIMIZERS
from funcmlo.testing.written import code, transformation
from tests.oracles import assert_agrees, bits

NAMES = {"torch": torch, "torchopt": torchopt, **vars(fm), **vars(strategies), **vars(hierarchy)}
MIXED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Pair = namedtuple("Pair", ["first", "second"])
ANY = st.floats(width=16) | st.floats(-3, 3, width=32) | st.floats()


@dataclass(frozen=True)
class Setting:
    size: int
    start: object = None
    rate: float = 0.1


NAMES |= {"OrderedDict": OrderedDict, "Pair": Pair, "Setting": Setting}


def same(a: object, b: object) -> bool:
    """Whether two trees are of the same types, with the same numbers to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(tree=strategies.trees(MIXED, numbers=ANY.filter(lambda x: not math.isnan(x))))
def test_trees_of_numbers_come_back_to_the_bit(tree: object) -> None:
    assert same(eval(code(tree), dict(NAMES)), tree)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "torch.zeros(2, 3, dtype=torch.float64)"),
        (torch.zeros(()), "torch.zeros((), dtype=torch.float32)"),
        (torch.ones(2), "torch.ones(2, dtype=torch.float32)"),
        (torch.tensor(1.0), "torch.tensor(1.0, dtype=torch.float32)"),
        (torch.full((2, 2), 0.1), "torch.full((2, 2), 0.1, dtype=torch.float32)"),
        (torch.full((4,), 7), "torch.full((4,), 7, dtype=torch.int64)"),
        (torch.tensor([[0.1], [1 / 3]]).double(), None),
        (torch.tensor([[0.1, -0.0]]), "torch.tensor([[0.1, -0.0]], dtype=torch.float32)"),
        (torch.tensor([-0.0, 0.0]), "torch.tensor([-0.0, 0.0], dtype=torch.float32)"),
        (torch.tensor([0.1, 3.0], dtype=torch.bfloat16), "torch.tensor([0.1, 3.0], dtype=torch.bfloat16)"),
        (torch.tensor([1 / 3], dtype=torch.float32), "torch.tensor([0.33333334], dtype=torch.float32)"),
        (torch.tensor([True, False]), "torch.tensor([True, False], dtype=torch.bool)"),
        (torch.tensor([math.inf, -math.inf]), "torch.tensor([float('inf'), float('-inf')], dtype=torch.float32)"),
        (torch.empty(0, 2), "torch.zeros(0, 2, dtype=torch.float32)"),
        (torch.arange(6).reshape(2, 3).T, "torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=torch.int64)"),
        ((1,), "(1,)"),
        ((), "()"),
        ([None, 0.1, -0.0, True, "a'b", b"c"], "[None, 0.1, -0.0, True, \"a'b\", b'c']"),
        (OrderedDict(b=1, a=2), "OrderedDict({'b': 1, 'a': 2})"),
        (Pair(1, (2, 3)), "Pair(first=1, second=(2, 3))"),
        (torch.Size([2, 3]), "torch.Size([2, 3])"),
        (torch.float16, "torch.float16"),
        (frozenset({2, 1}), "frozenset([1, 2])"),
        (set(), "set()"),
        (Setting(3), "Setting(3)"),
        (Setting(3, rate=0.5), "Setting(3, rate=0.5)"),
        (fm.AID(fm.CG(5, damping=0.1), warm_start=True), "AID(CG(5, damping=0.1), warm_start=True)"),
    ],
    ids=repr,
)
def test_what_is_written(value: object, text: str | None) -> None:
    assert text is None or code(value) == text
    assert same(eval(code(value), dict(NAMES)), value)


def test_nan_and_tensors_in_graphs_are_written() -> None:
    assert code(float("nan")) == "float('nan')"
    assert code(torch.tensor([math.nan])) == "torch.tensor([float('nan')], dtype=torch.float32)"
    assert code(torch.ones(1, requires_grad=True)) == "torch.tensor([1.0], dtype=torch.float32)"


@pytest.mark.parametrize("value", [lambda: 0, [object()], torchopt.sgd(lambda t: 0.1)], ids=["function", "object", "rate"])
def test_what_cannot_be_written_is_refused(value: object) -> None:
    with pytest.raises(fm.ParameterError, match="cannot be written as code"):
        code(value)
    with pytest.raises(fm.ParameterError, match=r"makes int; expected a torchopt transformation"):
        transformation("3")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_are_what_their_code_makes(kind: str) -> None:
    text = OPTIMIZERS[kind].format(0.05)
    named, plain = transformation(text), eval(text, dict(NAMES))
    assert repr(named) == code(named) == text
    answers = []
    for optimizer in (named, plain, transformation(code(named))):
        # The library knows the parts of an optimizer by the functions that made them: a name must not hide them.
        mended, params = optim.mend(optimizer), {"a": torch.tensor([1.0, -2.0]), "b": torch.ones(1, 1)}
        state = mended.init(params)
        for t in range(3):
            updates, state = mended.update(_tree.scale(t + 1.0, params), state, params=params)
            params = optim.apply(params, updates)
        answers.append(params)
    assert same(answers[0], answers[1])
    assert same(answers[0], answers[2])
    assert fm.Level("y", lambda y: y, named).optimizer is named
    if kind not in ("scheduled", "centered"):  # describe leaves these two no code, or no more than a part of it
        assert code(plain).startswith("torchopt.")


def falsified(strategy: st.SearchStrategy, holds: Callable[[object], bool]) -> tuple[str, object]:
    """What hypothesis prints of a property's failing example, and the value that this text makes."""

    @settings(database=None, derandomize=True, max_examples=500, phases=set(Phase) - {Phase.explain})
    @given(value=strategy)
    def example(value: object) -> None:
        assert holds(value)

    with pytest.raises(AssertionError) as caught:
        example()
    note = next(note for note in caught.value.__notes__ if "example(" in note)
    text = note[note.index("example(") : note.rindex(")") + 1]
    made: list[object] = []
    exec(text, {**NAMES, "example": lambda value: made.append(value)})
    argument = ast.parse(text, mode="eval").body.keywords[0].value  # type: ignore[attr-defined]
    return ast.unparse(argument), made[0]


ZERO = "torch.zeros((), dtype=torch.float64)"
LIKE = {"w": torch.zeros(2, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
FALSIFIED: dict[str, tuple[st.SearchStrategy, Callable, str]] = {
    "any tree": (strategies.trees(), lambda tree: False, ZERO),
    "tree": (strategies.trees(), lambda tree: _tree.size(tree) < 3, "torch.zeros(3, dtype=torch.float64)"),
    "two leaves": (strategies.trees(), lambda tree: len(_tree.leaves(tree)) < 2, f"({ZERO}, {ZERO})"),
    "dtype": (
        *(strategies.trees(MIXED), lambda tree: all(x.dtype != torch.float16 for x in _tree.leaves(tree))),
        "torch.zeros((), dtype=torch.float16)",
    ),
    "numbers": (
        strategies.trees(numbers=st.floats(-3, 3)),
        lambda tree: all((x <= 0).all() for x in _tree.leaves(tree)),
        "torch.tensor(1.0, dtype=torch.float64)",
    ),
    "vector": (
        strategies.vectors(LIKE),
        lambda tree: tree["w"][1] > -0.3,
        f"{{'w': torch.tensor([0.0, -0.5], dtype=torch.float64), 'b': {ZERO}}}",
    ),
    "any problem": (strategies.problems(), lambda problem: False, f"Quadratic(condition=1.0, y_like={ZERO}, x_like={ZERO})"),
    "no minimum": (
        strategies.problems({"nonsingular"}),
        lambda problem: "minimization" in problem.assumptions,
        "Equilibrium(size=1, contraction=0.25)",
    ),
    "indefinite": (
        strategies.problems({"minimization", "nonsingular"}),
        lambda problem: "positive definite" in problem.assumptions,
        "Saddle(size=1, coupling=0.0)",
    ),
    "hierarchy": (
        strategies.hierarchies(),
        lambda h: len(h.reads["p0"]) < 1,
        "Hierarchy({'p0': ('p1',), 'p1': ()}, size=1)",
    ),
    "graph": (
        strategies.graphs(),
        lambda graph: not graph.paths(graph.levels[-1]),
        "Graph(levels=('p0', 'p1'), u2l=(('p1', 'p0'),), l2u=(('p0', 'p1'),))",
    ),
    "fixed batch": (strategies.batches(LIKE["w"]), lambda batch: False, "torch.zeros(2, dtype=torch.float64)"),
    "batches": (
        strategies.batches(LIKE["b"]),
        lambda batch: not callable(batch) or torch.equal(batch(0), batch(1)),
        f"Cycle(({ZERO}, torch.tensor(0.25, dtype=torch.float64)))",
    ),
    "any optimizer": (strategies.optimizers(), lambda optimizer: False, "torchopt.sgd(0.1)"),
    "chain": (
        strategies.optimizers(),
        lambda optimizer: "clip" not in repr(optimizer),
        "torchopt.chain(torchopt.clip_grad_norm(0.3), torchopt.sgd(0.1, momentum=0.5))",
    ),
}


@pytest.mark.parametrize("name", FALSIFIED)
def test_failing_examples_are_small_and_their_text_makes_them_again(name: str) -> None:
    strategy, holds, smallest = FALSIFIED[name]
    text, value = falsified(strategy, holds)
    # hypothesis writes every field of a dataclass that has no code of its own, such as a graph's notes.
    assert text.replace(", notes={}", "") == ast.unparse(ast.parse(smallest, mode="eval"))
    assert same(value, eval(smallest, dict(NAMES))) or code(value) == code(eval(smallest, dict(NAMES)))
    # What the text makes fails as the drawn value did; a transformation is known by its repr alone, which is the text.
    assert not holds(transformation(text) if isinstance(value, GradientTransformation) else value)


@given(value=st.data())
def test_everything_drawn_has_code(value: st.DataObject) -> None:
    for strategy in (strategies.problems(), strategies.hierarchies(), strategies.graphs(), strategies.batches(LIKE)):
        drawn = value.draw(strategy)
        assert same(eval(code(drawn), dict(NAMES)), drawn)


@given(problem=strategies.problems(), data=st.data())
def test_random_problems_are_what_they_say(problem: Known, data: st.DataObject) -> None:
    if not isinstance(problem, Bilevel):
        return
    y, x = problem.solution(), problem.x
    v = data.draw(strategies.vectors(y))
    estimator = fm.AID(fm.GMRES(30, tol=1e-14))
    at = solved(lambda own, inputs: problem.inner(own, inputs["x"]), y, {"x": x}, estimator)
    if "nonsingular" in problem.assumptions:
        # Condition numbers are below 100; 1e-10 leaves room for four digits of rounding.
        answer = estimator.vjp(at, v, None)[0]["x"]
        assert_agrees(answer, ravel(problem.response(v)), relative=1e-10, size=torch.linalg.vector_norm(ravel(v)))
    gradient = torch.func.grad(lambda flat: problem.inner(unravel(flat, y), x))(ravel(y))
    assert torch.linalg.vector_norm(gradient) <= 1e-12 * (1 + torch.linalg.vector_norm(ravel(y)))


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(fm.ParameterError, match=r"none of Saddle meets positive definite"):
        strategies.problems({"positive definite"}, families=[strategies.Saddle])
    with pytest.raises(fm.ParameterError, match=r"adamm came; expected some of sgd, .*clipped adam"):
        strategies.optimizers(["adamm"])


def test_without_hypothesis_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "funcmlo.testing.strategies")
    with pytest.raises(ImportError, match=r"funcmlo.testing.strategies needs hypothesis: pip install hypothesis"):
        importlib.import_module("funcmlo.testing.strategies")
