"""A fresh batch for every product: which batches are drawn, and that their series are without bias."""

from __future__ import annotations

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo.curvature.base import Curvature
from tests.registry import vector_like

PRODUCTS = ["kept", "recompute", "forward", "finite_difference"]
SGD = torchopt.sgd(0.1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return vector_like(torch.zeros(*shape).double(), seed)


class Counting:
    """An indexed source that tells what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, t: int) -> Tensor:
        self.asked.append(t)
        return torch.tensor(1.0 + 0.1 * t, dtype=torch.float64)


def resampling(curvature: Curvature | None = None, steps: int = 2) -> fm.Multilevel:
    response = fm.AID(fm.Neumann(3, scale=0.1), curvature=fm.Resampled(curvature or fm.Hessian()))
    lower = fm.Level("y", lambda y, x, batch: ((y * batch - x) ** 2).sum() / 2, SGD, steps=steps, response=response)
    return fm.Multilevel(lower, fm.Level("x", lambda x, y: y.sum(), SGD))


CURVATURES = {
    **{name: fm.Hessian(products=name) for name in PRODUCTS},
    "gauss_newton": fm.GaussNewton(lambda y, x, batch: y * batch - x, lambda f: (f**2).sum() / 2),
    "damped": fm.Damped(1e-3),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CURVATURES)
def test_every_product_has_a_batch_of_its_own(name: str) -> None:
    program = resampling(CURVATURES[name])
    state = program.init({"y": torch.zeros(1).double(), "x": torch.ones(1).double()})
    source = Counting()
    gradient = program.hypergradient(state, {"y": source}, of="x")
    assert source.asked == [0, 1, 2, 3, 4, 5]  # two steps, three products, one cross product
    w, term = 1.0, 1.0
    for t in (2, 3, 4):
        term -= 0.1 * ((1.0 + 0.1 * t) ** 2 + (1e-3 if name == "damped" else 0.0)) * term
        w += term
    relative = 1e-7 if name == "finite_difference" else 1e-13
    assert float(gradient) == pytest.approx(0.1 * w * 1.5, rel=relative)  # −∇²_xy g is the batch


def test_an_iterator_gives_fresh_batches() -> None:
    program, source = resampling(), Counting()
    state, iterator = program.init({"y": torch.zeros(1).double(), "x": torch.ones(1).double()}), map(source, range(100))
    for step in range(3):
        state, _ = program.step(state, {"y": iterator})
        assert source.asked == list(range(6 * (step + 1)))


def test_resampled_series_are_without_bias() -> None:
    # g_i = ½ yᵀA_i y − yᵀB_i x over a population of four, one drawn for each product, independently.
    population = [(a @ a.T / 3, b) for a, b in zip(normal(4, 3, 3, seed=1), normal(4, 3, 2, seed=2), strict=True)]
    a, b = (sum(parts) / 4 for parts in zip(*population, strict=True))
    x, v, alpha, count, draws = normal(2, seed=3), normal(3, seed=4), 0.3, 3, 20_000
    term = w = alpha * v
    for _ in range(count):
        term = term - alpha * a @ term
        w = w + term
    expected = b.T @ w

    def loss(y, x, batch):
        return y @ batch[0] @ y / 2 - y @ batch[1] @ x

    stacked = torch.stack([a for a, _ in population]), torch.stack([b for _, b in population])
    chosen = torch.randint(4, (draws, count + 3), generator=torch.Generator().manual_seed(0))

    def z(curvature: Curvature) -> Tensor:
        response = fm.AID(fm.Neumann(count, scale=alpha), curvature=curvature)
        solve = fm.argmin(loss, SGD, steps=0, response=response)

        def answer(a: Tensor, b: Tensor) -> Tensor:
            return torch.func.grad(lambda x: v @ solve(torch.zeros(3).double(), x, batch=lambda t: (a[t], b[t])))(x)

        sample = torch.vmap(answer)(*(part[chosen] for part in stacked))
        return (sample.mean(0) - expected) / (sample.std(0) / draws**0.5)

    # Right code would fail by chance, with another seed, once in 1 / (2 · 2 Φ(−5)) ≈ 1e6 tries; one batch for all products
    # is biased, and is seen.
    assert z(fm.Resampled()).abs().max() < 5
    assert z(fm.Hessian()).abs().max() > 10
