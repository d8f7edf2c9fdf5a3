"""The curvature operators against dense matrices: Hessian, Gauss–Newton and damped ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from funcmlo.curvature.base import Curvature
from funcmlo.operators import ravel, unravel
from funcmlo.problem import Problem
from funcmlo.unroll import run
from tests.oracles import assert_agrees, dense_implicit
from tests.registry import DIFFERENCE, solved, vector_like

PRODUCTS = ["kept", "recompute", "forward", "finite_difference"]
SHAPES = {"w": torch.zeros(3, 2).double(), "b": torch.zeros(2).double(), "out": torch.zeros(2).double()}
SGD = torchopt.sgd(0.1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return vector_like(torch.zeros(*shape).double(), seed)


Y, V = _tree.scale(0.5, vector_like(SHAPES, 3)), vector_like(SHAPES, 4)
X = {"weights": normal(6, seed=5), "log_decay": torch.tensor(-3.0).double()}


DATA, LABELS = normal(6, 3, seed=1), normal(6, seed=2)


def net(y: dict[str, Tensor], weights: Tensor, log_decay: Tensor) -> Tensor:
    """A small net that is not convex, with a weight for each example and a learned decay."""
    hidden = torch.tanh(DATA @ y["w"] + y["b"])
    losses = (hidden @ y["out"] - LABELS) ** 2
    return (torch.sigmoid(weights) * losses).mean() + torch.exp(log_decay) * sum((leaf**2).sum() for leaf in y.values())


def by_names(y: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
    return net(y, **x)


def dense(curvature: Curvature, at: fm.Solved) -> Tensor:
    """The operator laid out."""
    zero = _tree.zeros_like(at.params)
    return curvature.within(at, zero, lambda operator, rhs, cross: operator.dense())


def hessian(loss: Callable[[object], Tensor], y: object) -> Tensor:
    return torch.func.hessian(lambda flat: loss(unravel(flat, y)))(ravel(y))


def bound(x: object, loss: Callable[..., object], batch: object) -> fm.Solved:
    """A level solved where it stands, with a batch."""
    level = fm.Level("y", loss, SGD, steps=0, response=fm.AID(fm.CG(3)))
    problem = Problem(level, lambda t: batch, seed=0, first=0)
    return run(problem, (Y, SGD.init(Y)), x, 0).solved


def accuracy(products: str, h: Tensor) -> float:
    """How far a solve may be: the products' relative error, by the condition number.

    Rounding of a few dozen operations; a central difference over √ε of the length of y leaves √ε of the gradient's terms.
    """
    return float(torch.linalg.cond(h)) * (1e-7 if products == "finite_difference" else 1e-14)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("products", PRODUCTS)
def test_every_product_is_the_dense_hessians(products: str) -> None:
    curvature = fm.Hessian(products=products)
    at = solved(by_names, Y, X, fm.AID(fm.Direct()))
    h = hessian(lambda y: by_names(y, X), Y)
    assert torch.linalg.eigvalsh(h)[0] < -0.01  # a saddle: nothing here needs a minimum
    relative = DIFFERENCE if products == "finite_difference" else 1e-13
    assert (dense(curvature, at) - h).abs().max() <= relative * h.abs().max()
    answers, _, stats = fm.AID(fm.Direct(), curvature=curvature).vjp(at, V, None)
    assert stats.hvps == 10
    for name, reference in dense_implicit(by_names, Y, X, V).items():
        assert_agrees(answers[name], reference, relative=accuracy(products, h))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("products", PRODUCTS)
def test_every_product_under_gradients_and_maps_of_a_solution(products: str) -> None:
    response = fm.AID(fm.Direct(), curvature=fm.Hessian(products=products))
    solve = fm.argmin(net, SGD, steps=0, response=response)

    def f(x: dict[str, Tensor], y: object = Y) -> Tensor:
        return _tree.dot(V, solve(y, x["weights"], x["log_decay"]))

    relative = accuracy(products, hessian(lambda y: by_names(y, X), Y))
    expected = dense_implicit(by_names, Y, X, V)
    leaf = _tree.map(lambda x: x.clone().requires_grad_(), X)
    f(leaf).backward()
    for answer in (torch.func.grad(f)(X), {name: x.grad for name, x in leaf.items()}):
        for name, reference in expected.items():
            assert_agrees(answer[name], reference, relative=relative)
    # Along a map the inputs and the points differ from lane to lane.
    xs = {"weights": normal(3, 6, seed=6), "log_decay": torch.tensor([-3.0, -2.0, -1.0]).double()}
    ys = _tree.map(lambda y: torch.stack([y, 0.5 * y, y + 0.1]), Y)
    mapped = torch.vmap(torch.func.grad(f))(xs, ys)
    for i in range(3):
        x, y = {name: values[i] for name, values in xs.items()}, _tree.map(lambda leaf, i=i: leaf[i], ys)
        relative = accuracy(products, hessian(lambda at, x=x: by_names(at, x), y))
        for name, reference in dense_implicit(by_names, y, x, V).items():
            assert_agrees(mapped[name][i], reference, relative=relative)


BATCH = (DATA, torch.tensor([0, 1, 2, 0, 1, 2]), LABELS)
"""Data, classes and numbers; the first output is the classes' logits, the others are tanh units."""


def outputs(y, scale, batch):
    hidden = torch.tanh(batch[0] @ y["w"] + y["b"])
    return {"logits": torch.cat([hidden, scale * (hidden @ y["out"])[:, None]], 1), "units": (hidden[:, 0],)}


def cross_entropy(f, weights, batch):
    return (torch.sigmoid(weights) * F.cross_entropy(f["logits"], batch[1], reduction="none")).sum() + f["units"][0].sum()


def squares(f, *, batch, weights):
    return (torch.sigmoid(weights) * (f["units"][0] - batch[2]) ** 2).mean() + (f["logits"] ** 2).mean()


@pytest.mark.filterwarnings("ignore:composition=")
@pytest.mark.parametrize("head", [cross_entropy, squares])
def test_gauss_newton_is_the_dense_one(head: Callable[..., Tensor]) -> None:
    x = {"scale": torch.tensor(1.5).double(), "weights": normal(6, seed=7)}

    def loss(y, scale, weights, batch):
        return head(outputs(y, scale, batch), weights=weights, batch=batch)

    at, curvature = bound(x, loss, batch=BATCH), fm.GaussNewton(outputs, head)
    y, shape = ravel(Y), outputs(Y, x["scale"], BATCH)
    jacobian = torch.func.jacrev(lambda flat: ravel(outputs(unravel(flat, Y), x["scale"], BATCH)))(y)
    g = jacobian.T @ hessian(lambda f: head(f, weights=x["weights"], batch=BATCH), shape) @ jacobian
    assert (dense(curvature, at) - g).abs().max() <= 1e-13 * g.abs().max()
    assert torch.linalg.eigvalsh(g)[0] >= -1e-14 * g.abs().max()
    h = hessian(lambda at: loss(at, **x, batch=BATCH), Y)
    assert torch.linalg.eigvalsh(h)[0] < -0.01

    # −∇²_xy g (G + λI)⁻¹ v, the cross product being that of the loss itself.
    w = torch.linalg.solve(g + 0.1 * torch.eye(10).double(), ravel(V))
    cross = torch.func.jacrev(
        lambda x: ravel(torch.func.grad(lambda at: loss(unravel(at, Y), **x, batch=BATCH))(y)), argnums=0
    )(x)
    expected = {name: -torch.tensordot(w, columns, 1) for name, columns in cross.items()}
    response = fm.AID(fm.Direct(), curvature=fm.Damped(0.1, curvature))
    solve = fm.argmin(loss, SGD, steps=0, response=response)

    def f(x: dict[str, Tensor], batch: object = BATCH) -> Tensor:
        return _tree.dot(V, solve(Y, **x, batch=batch))

    upper = fm.Level("scale", lambda scale, y: _tree.dot(V, y), SGD)
    weights = fm.Level("weights", lambda weights, y: _tree.dot(V, y), SGD)
    program = fm.Multilevel(fm.Level("y", loss, SGD, steps=0, response=response), weights, upper)
    state = program.init({"y": Y, **x})
    batches = torch.stack([BATCH[0], -BATCH[0]])
    mapped = torch.vmap(lambda data: torch.func.grad(f)(x, (data, *BATCH[1:])))(batches)
    for name, reference in expected.items():
        for answer in (
            response.vjp(at, V, None)[0][name],
            torch.func.grad(f)(x)[name],
            program.hypergradient(state, {"y": BATCH}, of=name),
            mapped[name][0],
        ):
            assert_agrees(answer, ravel(reference), relative=1e-11)


def test_gauss_newton_is_the_hessian_where_the_outputs_are_linear() -> None:
    at = bound(
        {},
        lambda y, batch: F.cross_entropy(batch[0] @ y["w"] + y["b"], batch[1] % 2) + (y["out"] ** 2).sum(),
        batch=BATCH,
    )
    curvature = fm.GaussNewton(
        lambda y, batch: [batch[0] @ y["w"] + y["b"], y["out"]],
        lambda f, batch: F.cross_entropy(f[0], batch[1] % 2) + (f[1] ** 2).sum(),
    )
    h = dense(fm.Hessian(), at)
    assert (dense(curvature, at) - h).abs().max() <= 1e-14 * h.abs().max()


def linear(y, x):
    return y * x


WRONG: dict[str, tuple[Callable[..., object], Callable[..., object], type[Exception], str]] = {
    "name": (lambda y, z: y, lambda f: f.sum(), fm.DefinitionError, r"reads 'z', which the level's loss does not; .* x"),
    "loss's name": (linear, lambda f, z: f.sum(), fm.DefinitionError, r"reads 'z', which the level's loss does not"),
    "vector": (linear, lambda f: f**2, fm.LossError, r"its loss returned a tensor of shape \(2,\); expected a scalar"),
    "pair": (linear, lambda f: (f.sum(), {}), fm.LossError, r"its loss returned tuple; expected a scalar"),
    "integers": (lambda y: (y, torch.ones(2).long()), lambda f: f[0].sum(), fm.LossError, r"outputs\[1\] are a .*int64"),
    "number": (lambda y: {"a": 1.0}, lambda f: f["a"], fm.LossError, r"outputs\['a'\] are float; expected a tree of"),
}


@pytest.mark.parametrize(("outputs", "loss", "error", "message"), WRONG.values(), ids=WRONG)
def test_gauss_newton_says_what_it_cannot_use(outputs, loss, error, message) -> None:
    response = fm.AID(fm.CG(2), curvature=fm.GaussNewton(outputs, loss))
    solve = fm.argmin(lambda y, x: (y * x).sum() ** 2, SGD, steps=0, response=response)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=message):
        solve(torch.ones(2), x).sum().backward()
    with pytest.raises(error, match=message):
        torch.func.grad(lambda x: solve(torch.ones(2), x).sum())(torch.ones(2))


NO_LOSS = {
    "GaussNewton": fm.GaussNewton(lambda y: y, lambda f: f.sum()),
    "Resampled": fm.Resampled(),
    **{f"Hessian(products='{name}')": fm.Hessian(products=name) for name in PRODUCTS[1:]},
}


@pytest.mark.parametrize("name", NO_LOSS)
def test_a_fixed_point_has_no_loss_for_them(name: str) -> None:
    # A resampled symmetric operator would be a wrong one here, silently.
    solve = fm.fixed_point(lambda y, x: 0.5 * y.flip(0) + x, steps=3, response=fm.AID(fm.Direct(), curvature=NO_LOSS[name]))
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(fm.EstimatorError) as told:
        solve(torch.zeros(2), x).sum().backward()
    assert f"{name} needs a loss, and a fixed point has none; use AID(GMRES(…))" in str(told.value)


def test_settings_without_a_meaning_are_refused() -> None:
    for make, message in {
        lambda: fm.Hessian(products="fast"): r"Hessian\(products='fast'\): expected 'kept', 'recompute'",
        lambda: fm.GaussNewton("net", lambda f: f): r"GaussNewton\(outputs='net'\): expected a function",
        lambda: fm.GaussNewton(lambda: 0, lambda f: f): r"its outputs takes no positional argument",
        lambda: fm.Damped(0.0): r"Damped\(damping=0.0\): expected a positive finite number",
        lambda: fm.Damped(1.0, fm.CG(3)): r"Damped\(curvature=CG.*expected a curvature",
        lambda: fm.Resampled(fm.FixedPoint()): r"expected a curvature of the loss",
        lambda: fm.Resampled(fm.Damped(1.0, fm.FixedPoint())): r"expected a curvature of the loss",
        lambda: fm.AID(fm.CG(3), curvature=fm.Damped(1.0, fm.FixedPoint())): r"CG solves symmetric systems",
    }.items():
        with pytest.raises(fm.DefinitionError, match=message):
            make()


@pytest.mark.parametrize("curvature", [fm.Hessian(), fm.FixedPoint(), fm.Resampled()], ids=lambda c: type(c).__name__)
def test_damping_adds_a_multiple_of_the_identity(curvature: Curvature) -> None:
    at = solved(by_names, Y, X, fm.AID(fm.CG(3)), torchopt.sgd(0.1, momentum=0.9))
    zero = _tree.zeros_like(Y)

    def both(operator, rhs, cross):
        forth = operator.dense()
        back = None if operator.transpose is None else fm.Operator(operator.transpose, like=operator.like).dense()
        return forth, back

    plain, plain_back = curvature.within(at, zero, both, transpose=True)
    shifted, shifted_back = fm.Damped(0.3, curvature).within(at, zero, both, transpose=True)
    eye = 0.3 * torch.eye(len(plain)).double()
    assert torch.allclose(shifted, plain + eye, rtol=0, atol=1e-15)
    assert (plain_back is None) == curvature.symmetric
    if plain_back is not None:
        assert torch.allclose(plain_back, plain.T, rtol=0, atol=1e-15)
        assert torch.allclose(shifted_back, plain.T + eye, rtol=0, atol=1e-15)
