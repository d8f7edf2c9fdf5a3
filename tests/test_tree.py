"""Trees as vectors, and what is said about trees that do not match."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import ravel, unravel
from tests.programs import SGD
from tests.registry import structures, vector_like

MIXED = (torch.float32, torch.float64, torch.bfloat16)


@given(tree=structures(), seed=st.integers(0, 2**20), factor=st.floats(-3, 3))
def test_vector_operations_are_those_of_the_flat_vectors(tree: object, seed: int, factor: float) -> None:
    a, b = vector_like(tree, seed), vector_like(tree, seed + 1)
    x, y = ravel(a), ravel(b)
    assert torch.equal(ravel(_tree.add(a, b)), x + y)
    assert torch.equal(ravel(_tree.subtract(a, b)), x - y)
    assert torch.equal(ravel(_tree.negative(a)), -x)
    assert torch.allclose(ravel(_tree.scale(factor, a)), factor * x)
    assert torch.allclose(ravel(_tree.add_scaled(a, torch.tensor(factor), b)), x + torch.tensor(factor) * y)
    assert torch.allclose(_tree.dot(a, b), (x * y).sum(), rtol=1e-12, atol=1e-12)
    assert torch.allclose(_tree.norm(a), torch.linalg.vector_norm(x), rtol=1e-12)
    assert _tree.size(a) == x.numel()
    assert torch.equal(ravel(_tree.where(torch.tensor(True), a, b)), x)
    assert torch.equal(ravel(_tree.where(torch.tensor(False), a, b)), y)
    assert not ravel(_tree.zeros_like(a)).any()


@given(tree=structures(MIXED), seed=st.integers(0, 2**20))
def test_every_operation_keeps_each_leafs_dtype(tree: object, seed: int) -> None:
    a, b = vector_like(tree, seed), vector_like(tree, seed + 1)
    factor = torch.tensor(0.5, dtype=torch.float64)
    for result in (_tree.add(a, b), _tree.scale(factor, a), _tree.add_scaled(a, factor, b), unravel(ravel(a), a)):
        assert _tree.mismatch(a, result) is None
    assert _tree.dot(a, b).dtype in (torch.float32, torch.float64)
    assert _tree.mismatch(a, unravel(ravel(a), a)) is None
    assert torch.equal(ravel(unravel(ravel(a), a)), ravel(a))


MISMATCHES = [
    ({"a": 1.0}, {"b": 1.0}, r"structure \{'b': \*\}, expected \{'a': \*\}"),
    ([1.0, 1.0], [1.0], r"structure \[\*\], expected \[\*, \*\]"),
    ({"a": [1.0]}, {"a": [None]}, "structure"),
]


@pytest.mark.parametrize(("expected", "came", "message"), MISMATCHES)
def test_mismatched_structures_are_named(expected: object, came: object, message: str) -> None:
    import re

    answer = _tree.mismatch(*(_tree.map(torch.tensor, tree) for tree in (expected, came)))
    assert answer is not None
    assert re.search(message, answer)


def test_mismatched_leaves_are_named() -> None:
    a = {"w": [torch.zeros(2)]}
    assert _tree.mismatch(a, {"w": [torch.zeros(2)]}) is None
    assert _tree.mismatch(a, {"w": [torch.zeros(3)]}) == "leaf ['w'][0] has shape (3,), expected (2,)"
    assert _tree.mismatch(a, {"w": [1.0]}) == "leaf ['w'][0] is float, expected a tensor"
    assert _tree.mismatch(a, {"w": [torch.zeros(2).double()]}) == (
        "leaf ['w'][0] has dtype torch.float64, expected torch.float32"
    )


def test_finiteness_looks_at_floating_point_tensors_only() -> None:
    assert _tree.finite({"a": torch.ones(2), "b": 3, "c": torch.tensor([1])})
    assert not _tree.finite([torch.ones(2), torch.tensor([1.0, torch.inf])])
    assert not _tree.finite(torch.tensor(torch.nan))


def test_a_lower_tree_of_which_the_upper_cost_reads_a_part() -> None:
    # y* = x leaf by leaf, and the upper cost reads one leaf: nothing to warn of, and the response is not dropped.
    p = fm.Multilevel(
        fm.Level("y", lambda y, x: sum(((y[k] - x[k]) ** 2).sum() for k in "ab") / 2, SGD, response=fm.AID(fm.CG(3))),
        fm.Level("x", lambda x, y: y["a"].sum(), SGD),
    )
    tree = {"a": torch.zeros(2), "b": torch.ones(3)}
    answer = p.hypergradient(p.init({"y": tree, "x": tree}), {}, of="x")
    assert torch.allclose(answer["a"], torch.ones(2))
    assert torch.equal(answer["b"], torch.zeros(3))


def test_scalars_about_a_tree_are_in_its_widest_dtype_and_at_least_float32() -> None:
    # 1 + 1/256 twice over needs 9 bits; bfloat16 has 8.
    ones = torch.ones(4097, dtype=torch.bfloat16)
    assert _tree.dot(ones, ones).dtype == torch.float32
    assert float(_tree.dot(ones, ones)) == 4097.0
    assert _tree.precision([ones, ones.double()]) == torch.float64
    assert _tree.precision({}) == torch.float32


def test_the_coarsest_leaf_says_what_rounding_is() -> None:
    mixed = [torch.zeros(2).double(), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)]
    assert _tree.coarsest_epsilon(mixed) == torch.finfo(torch.bfloat16).eps
    assert _tree.coarsest_epsilon({}) == torch.finfo(torch.float32).eps
