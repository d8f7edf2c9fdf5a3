"""K-FAC against dense Gauss–Newton matrices, and as a preconditioner of conjugate gradient."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchopt
from torch import Tensor, nn

import funcmlo as fm
from funcmlo import _tree
from funcmlo.curvature import GaussNewton
from funcmlo.linear.differentiable import System, solve
from funcmlo.operators import Operator, ravel, unravel
from funcmlo.problem import Problem
from funcmlo.unroll import run
from tests.oracles import assert_agrees, fingerprint
from tests.registry import vector_like


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stateless(
    module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[fm.Stateless, dict[str, Tensor]]:
    """A network, and parameters at which it has signals to look at."""
    net = fm.Stateless(module.double())
    params = {name: 0.7 * normal(*x.shape, seed=seed + i).to(dtype) for i, (name, x) in enumerate(net.params().items())}
    return net, params


def batch(params: object, batch: object) -> object:
    del params
    return batch


def point(net: fm.Stateless, params: object, loss: nn.Module, data: object) -> fm.Solved:
    """A level whose last batch was `data`, solved where it stands."""
    level = fm.Level(
        "w", lambda w, batch: loss(net(w, batch[0]), batch[1]), torchopt.sgd(1.0), steps=0, response=fm.AID(fm.Direct())
    )
    standing = (params, level.optimizer_for({}).init(params))
    return run(Problem(level, lambda t: data, seed=0, first=0), standing, {}, 0, "solution").solved


def at(net: fm.Stateless, params: object, loss: nn.Module, data: object) -> Operator:
    """An operator at that level's solution, whose products are never asked for."""
    return Operator(lambda u: pytest.fail("K-FAC applied H"), like=params, point=point(net, params, loss, data))


def gauss_newton(net: fm.Stateless, params: object, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Jᵀ ∇²ℓ J, dense."""
    flat = ravel(params)

    def outputs(at: Tensor) -> Tensor:
        return net(unravel(at, params), x).reshape(-1)

    f, shape = outputs(flat), net(params, x).shape
    jacobian = torch.func.jacrev(outputs)(flat)
    return jacobian.T @ torch.func.jacrev(torch.func.grad(lambda f: loss(f.reshape(shape), y)))(f) @ jacobian


def dense(k: fm.KFAC, operator: Operator) -> Tensor:
    """K, from its damped inverse."""
    inverse = Operator(k.inverse(operator), like=operator.like).dense()
    assert torch.allclose(inverse, inverse.T, rtol=1e-9, atol=1e-12)
    return torch.linalg.inv(inverse) - k.damping * torch.eye(len(inverse), dtype=inverse.dtype)


def by_layer(matrix: Tensor, params: dict[str, Tensor]) -> Tensor:
    """The blocks of a matrix that belong to one layer each."""
    layers = torch.cat([
        torch.full((params[name].numel(),), hash(name.rpartition(".")[0]) % 2**31) for name in sorted(params)
    ])
    return torch.where(layers[:, None] == layers[None, :], matrix, 0)


X, Y, LABELS = normal(7, 3), normal(7, 2, seed=1), torch.tensor([0, 1, 1, 0, 1, 0, 0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("corrected", [False, True])
def test_one_linear_layer_under_a_squared_error_is_solved_exactly(reduction: str, bias: bool, corrected: bool) -> None:
    net, params = stateless(nn.Linear(3, 2, bias=bias))
    loss, damping, v = nn.MSELoss(reduction=reduction), 0.1, vector_like(params, 5)
    solution = fm.KFAC(net, loss, batch, damping, eigenvalue_corrected=corrected).solve(at(net, params, loss, (X, Y)), v)
    h = gauss_newton(net, params, loss, X, Y)
    assert_agrees(solution.value, torch.linalg.solve(h + damping * torch.eye(len(h)).double(), ravel(v)), relative=1e-10)
    assert _tree.mismatch(v, solution.value) is None
    assert (solution.products, solution.residual, solution.converged) == (0, None, None)


@pytest.mark.parametrize("corrected", [False, True])
def test_deep_linear_networks_have_the_gauss_newton_blocks(corrected: bool) -> None:
    # The gradients by a layer's outputs do not depend on the example there, so E[aaᵀ ⊗ ggᵀ] = E[aaᵀ] ⊗ E[ggᵀ].
    net, params = stateless(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)))
    loss = nn.MSELoss()
    k = dense(fm.KFAC(net, loss, batch, 0.1, eigenvalue_corrected=corrected), at(net, params, loss, (X, Y)))
    whole = gauss_newton(net, params, loss, X, Y)
    assert torch.allclose(k, by_layer(whole, params), rtol=1e-8, atol=1e-10)
    assert not torch.allclose(k, whole, rtol=1e-2, atol=1e-2)


def test_a_convolution_that_sees_the_whole_image_is_a_linear_layer() -> None:
    net, params = stateless(nn.Sequential(nn.Conv2d(2, 3, (2, 2)), nn.Flatten()))
    loss, x, y = nn.MSELoss(), normal(9, 2, 2, 2), normal(9, 3, seed=1)
    for sharing in ("expand", "reduce"):
        k = dense(fm.KFAC(net, loss, batch, 0.1, sharing=sharing), at(net, params, loss, (x, y)))
        assert torch.allclose(k, gauss_newton(net, params, loss, x, y), rtol=1e-8, atol=1e-10), sharing


class Pooled(nn.Module):
    """A deep linear network at three places of an example, whose outputs are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.places(x).mean(1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_weights_shared_by_places(sharing: str) -> None:
    # Deep linear, "expand" is exact where every place has its own loss, "reduce" where the outputs are averaged.
    module, y = (
        (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), normal(6, 3, 2)) if sharing == "expand" else (Pooled(), Y[:6])
    )
    net, params = stateless(module)
    loss, x = nn.MSELoss(), normal(6, 3, 2, seed=3)
    operator = at(net, params, loss, (x, y))
    whole = by_layer(gauss_newton(net, params, loss, x, y), params)
    assert torch.allclose(dense(fm.KFAC(net, loss, batch, 0.1, sharing=sharing), operator), whole, rtol=1e-8, atol=1e-10)
    other = "reduce" if sharing == "expand" else "expand"
    assert not torch.allclose(dense(fm.KFAC(net, loss, batch, 0.1, sharing=other), operator), whole, rtol=1e-2, atol=1e-2)


def classifier() -> tuple[fm.Stateless, dict[str, Tensor], Tensor, Tensor]:
    """A softmax layer, E[ããᵀ] of its inputs, and its Gauss–Newton matrix, on (outputs, inputs + 1) laid out by rows."""
    net, params = stateless(nn.Linear(3, 2))
    inputs = torch.cat([X, torch.ones(7, 1).double()], dim=1)
    p = net(params, X).softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    whole = torch.einsum("nij,nk,nl->ikjl", curvature, inputs, inputs).reshape(8, 8) / 7
    return net, params, inputs.T @ inputs / 7, whole


def rows(matrix: Tensor) -> Tensor:
    """A matrix on (bias, weight) laid out as on (outputs, inputs + 1)."""
    order = torch.cat([torch.arange(2, 8).reshape(2, 3), torch.arange(2)[:, None]], dim=1).reshape(-1)
    return matrix[order][:, order]


def gradient_covariance(fisher: str, net: fm.Stateless, params: object) -> Tensor:
    p = net(params, X).softmax(1)
    if fisher == "forward-only":
        return torch.eye(2).double()
    if fisher == "empirical":
        g = p - nn.functional.one_hot(LABELS)
        return g.T @ g / 7
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_the_block_of_a_softmax_layer(fisher: str) -> None:
    net, params, of_inputs, _ = classifier()
    loss = nn.CrossEntropyLoss()
    k = rows(dense(fm.KFAC(net, loss, batch, 0.1, fisher=fisher), at(net, params, loss, (X, LABELS))))
    assert torch.allclose(k, torch.kron(gradient_covariance(fisher, net, params), of_inputs), rtol=1e-8, atol=1e-10)


def test_measured_eigenvalues_are_the_best_along_the_eigenvectors() -> None:
    net, params, of_inputs, whole = classifier()
    loss = nn.CrossEntropyLoss()
    k = rows(dense(fm.KFAC(net, loss, batch, 0.1, eigenvalue_corrected=True), at(net, params, loss, (X, LABELS))))
    covariance = gradient_covariance("type-2", net, params)
    q = torch.kron(torch.linalg.eigh(covariance).eigenvectors, torch.linalg.eigh(of_inputs).eigenvectors)
    assert torch.allclose(k, q @ torch.diag(torch.diag(q.T @ whole @ q)) @ q.T, rtol=1e-8, atol=1e-10)
    assert (k - whole).norm() < (torch.kron(covariance, of_inputs) - whole).norm()


def test_sampled_labels_tend_to_the_exact_curvature_and_repeat() -> None:
    net, params, _, _ = classifier()
    loss, global_state = nn.CrossEntropyLoss(), torch.get_rng_state()
    operator = at(net, params, loss, (X, LABELS))
    exact = dense(fm.KFAC(net, loss, batch, 0.1), operator)
    errors = []
    for samples in (1, 1000):
        sampled = [dense(fm.KFAC(net, loss, batch, 0.1, fisher="mc", samples=samples), operator) for _ in range(2)]
        assert torch.equal(*sampled)
        errors.append(float((sampled[0] - exact).norm() / exact.norm()))
    assert errors[1] < 0.02 < errors[0]
    other = replace(operator, point=replace(operator.point, seed=operator.point.seed + 1))
    assert not torch.allclose(dense(fm.KFAC(net, loss, batch, 0.1, fisher="mc", samples=1000), other), sampled[0], rtol=1e-6)
    assert torch.equal(global_state, torch.get_rng_state())


def test_binary_cross_entropy() -> None:
    net, params = stateless(nn.Linear(3, 1))
    loss, y = nn.BCEWithLogitsLoss(), LABELS[:, None].double()
    k = dense(fm.KFAC(net, loss, batch, 0.1, eigenvalue_corrected=True), at(net, params, loss, (X, y)))
    p = net(params, X).sigmoid()[:, 0]
    inputs = torch.cat([torch.ones(7, 1).double(), X], dim=1)
    whole = inputs.T @ (inputs * (p * (1 - p))[:, None]) / 7
    q = torch.linalg.eigh(inputs.T @ inputs).eigenvectors
    assert torch.allclose(k, q @ torch.diag(torch.diag(q.T @ whole @ q)) @ q.T, rtol=1e-8, atol=1e-10)


def uneven(loss: nn.Module) -> tuple[fm.Stateless, dict[str, Tensor], Tensor, Tensor]:
    """A two-layer network on inputs whose scales differ by 1000."""
    scales = torch.logspace(-1.5, 1.5, 6, dtype=torch.float64)
    z = normal(300, 6)
    net, params = stateless(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), seed=1)
    params["0.weight"] = params["0.weight"] / scales
    y = z[:, :3].argmax(1) if isinstance(loss, nn.CrossEntropyLoss) else torch.sin(z[:, :3])
    return net, params, z * scales, y


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss()], ids=str)
def test_it_saves_conjugate_gradient_products(loss: nn.Module, corrected: bool) -> None:
    net, params, x, y = uneven(loss)
    damping, v, solved = 1e-5, vector_like(params, 3), point(net, params, loss, (x, y))
    curvature = GaussNewton(lambda w, batch: net(w, batch[0]), lambda f, batch: loss(f, batch[1]))
    matrix = gauss_newton(net, params, loss, x, y) + damping * torch.eye(_tree.size(params)).double()
    expected = torch.linalg.solve(matrix, ravel(v))
    products = []
    for preconditioner in (None, fm.KFAC(net, loss, batch, damping, eigenvalue_corrected=corrected)):
        solver = fm.CG(2000, tol=1e-8, damping=damping, preconditioner=preconditioner)

        def body(operator: Operator, rhs: object, cross: object, solver: fm.CG = solver) -> object:
            del cross
            found = solver.solve(Operator(operator.matvec, like=operator.like, point=solved), rhs)
            products.append(found.products)
            return found.value, found.residual

        with torch.no_grad():
            value, residual = curvature.within(solved, v, body)
        assert float(residual) <= 1e-8
        assert (matrix @ ravel(value) - ravel(v)).norm() <= 2e-8 * ravel(v).norm()
        assert_agrees(value, expected, relative=1e-3 if preconditioner is None else 1e-5)
    plain, ours = products
    assert ours < plain / 4, products


def test_aid_hands_over_its_solution() -> None:
    # w* = argmin mean (x·Xw − t)² = X⁺t / x, and K-FAC is exact there, at inputs that it is told by the level's names.
    net = fm.Stateless(nn.Linear(3, 1, bias=False).double())
    loss, t = nn.MSELoss(), normal(7, 1, seed=4)
    responses = {
        "alone": fm.AID(fm.KFAC(net, loss, lambda w, x, batch: (x * batch, t), 1e-12)),
        "preconditioner": fm.AID(fm.CG(1, preconditioner=fm.KFAC(net, loss, lambda w, x, batch: (x * batch, t), 1e-12))),
    }
    for name, response in responses.items():
        program = fm.Multilevel(
            fm.Level("w", lambda w, x, batch: loss(net(w, x * batch), t), torchopt.sgd(1.0), steps=0, response=response),
            fm.Level("x", lambda x, w: w["weight"].sum(), torchopt.sgd(0.1)),
        )
        best = torch.linalg.lstsq(X, t).solution.T
        state = program.init({"w": {"weight": best / 2}, "x": torch.tensor(2.0, dtype=torch.float64)})
        found = program.hypergradient(state, {"w": X}, of="x")
        assert torch.allclose(found, -best.sum() / 4, rtol=1e-8), name


def test_the_solve_that_can_be_differentiated_hands_over_the_solution_too() -> None:
    net, params = stateless(nn.Linear(3, 2))
    loss, v = nn.MSELoss(), vector_like(params, 5)

    def gradient(constants: object, w: object, x: object) -> object:
        del constants, x
        return torch.func.grad(lambda at: loss(net(at, X), Y))(w)

    solver = fm.CG(1, preconditioner=fm.KFAC(net, loss, batch, 1e-12))
    system = System(solver, gradient, point=point(net, params, loss, (X, Y)))

    def size(v: object) -> Tensor:
        return _tree.dot(v, solve(system, (), params, {}, v).value)

    expected = torch.linalg.solve(gauss_newton(net, params, loss, X, Y), ravel(v))
    assert_agrees(torch.func.grad(size)(v), 2 * expected, relative=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("corrected", [False, True])
def test_answers_have_the_dtype_of_the_parameters(dtype: torch.dtype, corrected: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net, params = stateless(module)
    loss, v = nn.MSELoss(), vector_like(params, 5)
    k = fm.KFAC(net, loss, batch, 0.1, eigenvalue_corrected=corrected)
    expected = k.solve(at(net, params, loss, (X, Y)), v).value

    def down(tree: object) -> object:
        return _tree.map(lambda x: x.to(dtype), tree)

    found = k.solve(at(net, down(params), loss, (X.to(dtype), Y.to(dtype))), down(v)).value
    assert {x.dtype for x in found.values()} == {dtype}
    relative = 1e-5 if dtype == torch.float32 else 0.05
    assert (ravel(found).double() - ravel(expected)).norm() <= relative * ravel(expected).norm()


def test_float32_blocks_stay_positive_definite() -> None:
    # Two identical inputs: A is singular, and float32's rounding gives it an eigenvalue below zero, far above λ.
    x = normal(50, 3).float().repeat(1, 8) * 100
    module = nn.Linear(24, 2)
    net, params = fm.Stateless(module), {name: p.detach() for name, p in module.named_parameters()}
    loss = nn.MSELoss()
    inverse = fm.KFAC(net, loss, batch, 1e-6).inverse(at(net, params, loss, (x, torch.zeros(50, 2))))
    matrix = Operator(inverse, like=params).dense().double()
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert eigenvalues[0] > -1e-5 * eigenvalues[-1]
    assert abs(float(eigenvalues[-1]) - 1e6) < 1e3  # 1/λ, where K is singular


def test_nothing_of_the_users_is_changed() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    module[0].requires_grad_(False)
    net, loss = fm.Stateless(module), nn.MSELoss()
    params = net.params()
    before = [fingerprint(tree) for tree in (dict(module.named_parameters()), params, X, Y)]
    for corrected in (False, True):
        for given in (net, module):
            k = fm.KFAC(given, loss, batch, 0.1, eigenvalue_corrected=corrected)
            k.solve(at(net, params, loss, (X, Y)), vector_like(params, 5))
    assert [fingerprint(tree) for tree in (dict(module.named_parameters()), params, X, Y)] == before
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_module_of_its_own_holds_the_parameters() -> None:
    net, params = stateless(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    module = net.module(params)
    assert torch.equal(module(X), net(params, X))
    with torch.no_grad():
        module[0].weight.zero_()
    assert params["0.weight"].abs().min() > 0
    assert all(p.requires_grad for p in module.parameters())
    with pytest.raises(fm.ParameterError, match=r"parameter '0\.bias' is missing"):
        net.module({"0.weight": params["0.weight"]})


def test_other_layers_take_a_number() -> None:
    net, params = stateless(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    loss, v = nn.MSELoss(), vector_like(params, 5)
    operator = at(net, params, loss, (X, Y))
    with pytest.raises(fm.EstimatorError, match=r"these parameters belong to none: 1\.weight, 1\.bias\. Give others="):
        fm.KFAC(net, loss, batch, 0.1).solve(operator, v)
    found = fm.KFAC(net, loss, batch, 0.1, others=0.4).solve(operator, v).value
    for name in ("1.weight", "1.bias"):
        assert torch.allclose(found[name], v[name] / 0.5, rtol=1e-12)
    whole = by_layer(gauss_newton(net, params, loss, X, Y), params)  # deep linear behind the last layer: its block is exact
    expected = unravel(torch.linalg.solve(whole + 0.1 * torch.eye(len(whole)).double(), ravel(v)), v)
    for name in ("2.weight", "2.bias"):
        assert torch.allclose(found[name], expected[name], rtol=1e-9)


def test_blocks_of_right_hand_sides() -> None:
    net, params = stateless(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    loss, many = nn.MSELoss(), [vector_like(params, seed) for seed in range(3)]
    prepared = fm.KFAC(net, loss, batch, 0.1).init(at(net, params, loss, (X, Y)))
    together = prepared.solve_block(_tree.map(lambda *x: torch.stack(x), *many)).value
    for i, v in enumerate(many):
        assert_agrees(_tree.map(lambda x, i=i: x[i], together), ravel(prepared.solve(v).value), relative=1e-12)


def solution(response: fm.BestResponse, net: fm.Stateless, loss: nn.Module, t: Tensor) -> Callable[[Tensor], Tensor]:
    solve = fm.argmin(lambda w, x: loss(net(w, X), x * t), torchopt.sgd(0.1), steps=20, response=response)
    return lambda x: (solve({"weight": torch.zeros(1, 3).double()}, x)["weight"] ** 2).sum()


def test_it_works_under_torch_func_grad_and_refuses_maps() -> None:
    net = fm.Stateless(nn.Linear(3, 1, bias=False).double())
    loss, t, x = nn.MSELoss(), normal(7, 1, seed=4), torch.tensor(2.0, dtype=torch.float64)
    value = solution(fm.AID(fm.KFAC(net, loss, lambda w, x: (X, x * t), 1e-9)), net, loss, t)
    expected = solution(fm.AID(fm.Direct()), net, loss, t)
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(value(leaf), leaf)
    assert torch.allclose(plain, torch.func.grad(expected)(x), rtol=1e-6)
    assert torch.allclose(torch.func.grad(value)(x), plain, rtol=1e-9)
    with pytest.raises(fm.EstimatorError, match=r"AID\(.*\) does not work under torch\.func\.vmap"):
        torch.func.vmap(torch.func.grad(value))(torch.stack([x, x + 1]))
    preconditioned = fm.AID(fm.CG(20, preconditioner=fm.KFAC(net, loss, lambda w, x: (X, x * t), 1e-9)))
    assert torch.allclose(torch.func.grad(solution(preconditioned, net, loss, t))(x), plain, rtol=1e-6)
    with pytest.raises(fm.EstimatorError, match=r"AID\(.*\) does not work under torch\.func\.vmap"):
        torch.func.vmap(torch.func.grad(solution(preconditioned, net, loss, t)))(torch.stack([x, x + 1]))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


@pytest.mark.parametrize(
    ("module", "loss", "data", "settings", "message"),
    [
        (Twice(), nn.MSELoss(), (X, X), {}, r"Twice calls 'layer' 2 times"),
        (Attending(), nn.MSELoss(), (X, X), {"others": 1.0}, r"calls 'attention.out_proj' 0 times"),
        (
            Flat(3, 2),
            nn.MSELoss(),
            (X, Y),
            {},
            r"outputs of shape \(examples, …, outputs\), but the network returned \(7,\)",
        ),
        (nn.Linear(3, 2), nn.MSELoss(), X, {}, r"its data returned Tensor; expected a pair"),
        (
            nn.Linear(3, 2),
            nn.MSELoss(),
            (X[:, None], Y),
            {"eigenvalue_corrected": True},
            r"eigenvalue_corrected=True\) takes outputs of shape \(examples, outputs\), but \(7, 1, 2\) came",
        ),
        (nn.Linear(3, 2), nn.MSELoss(), (X, LABELS), {"fisher": "empirical"}, r"numbers of shape \(7, 2\), but torch.int64"),
        (nn.Linear(3, 2), nn.CrossEntropyLoss(), (X, Y), {"fisher": "empirical"}, r"class indices of shape \(7,\)"),
        (nn.Linear(3, 2), nn.CrossEntropyLoss(), (X, LABELS - 100), {}, r"the targets have labels that CrossEntropyLoss"),
        (nn.Linear(3, 2), nn.MSELoss(), (X * torch.nan, Y), {}, r"no eigenvectors, is something not finite"),
    ],
)
def test_what_it_cannot_be_taken_of(
    module: nn.Module, loss: nn.Module, data: object, settings: dict[str, object], message: str
) -> None:
    net, params = stateless(module)
    with pytest.raises(fm.EstimatorError, match=message):
        fm.KFAC(net, loss, batch, 0.1, **settings).inverse(at(net, params, loss, data))


def test_parameters_that_are_not_the_networks() -> None:
    net, params = stateless(nn.Linear(3, 2))
    loss = nn.MSELoss()
    operator = Operator(lambda u: u, like={}, point=point(net, params, loss, (X, Y)))
    with pytest.raises(fm.ParameterError, match=r"Stateless\(Linear\) has no parameter 'bias'"):
        fm.KFAC(nn.Linear(3, 2, bias=False), loss, batch, 0.1).inverse(operator)
    with pytest.raises(fm.EstimatorError, match=r"this operator belongs to none; use it in AID"):
        fm.KFAC(net, loss, batch, 0.1).inverse(Operator(lambda u: u, like=params))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"net": torch.relu}, r"KFAC\(net=.*expected fm\.Stateless\(module\), or the module"),
        ({"loss": nn.L1Loss()}, r"expected an instance of nn\.MSELoss, nn\.CrossEntropyLoss, nn\.BCEWithLogitsLoss"),
        ({"loss": nn.MSELoss(reduction="none")}, r"reduction='none'; expected 'mean' or 'sum'"),
        ({"loss": nn.CrossEntropyLoss(weight=torch.ones(2))}, r"weight= is not seen by K-FAC"),
        ({"loss": nn.BCEWithLogitsLoss(pos_weight=torch.zeros(1))}, r"pos_weight= is not seen"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, r"label_smoothing= is not seen"),
        ({"data": (X, Y)}, r"expected a function from the parameters to \(X, y\)"),
        ({"data": lambda: None}, r"KFAC: its data takes no positional argument"),
        ({"damping": 0.0}, r"damping=0\): K may be singular"),
        ({"damping": -1.0}, r"damping=-1\.0\): expected a finite number"),
        ({"others": -1.0}, r"others=-1\.0\): expected a finite number"),
        ({"fisher": "exact"}, r"fisher='exact'\): expected one of 'type-2', 'mc', 'empirical', 'forward-only'"),
        ({"sharing": "all"}, r"sharing='all'\): expected one of 'expand', 'reduce'"),
        ({"fisher": "mc", "samples": 0}, r"samples=0\): expected an integer of at least 1"),
        ({"samples": 3}, r"samples=3\): only fisher='mc' draws"),
        ({"fisher": "forward-only", "eigenvalue_corrected": True}, r"'forward-only' has no eigenvalues to measure"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    defaults = {"net": nn.Linear(3, 2), "loss": nn.MSELoss(), "data": batch, "damping": 0.1}
    with pytest.raises(fm.DefinitionError, match=message):
        fm.KFAC(**{**defaults, **settings})


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(fm.EstimatorError, match=r"curvlinops, which cannot be imported.*pip install 'funcmlo\[kfac\]'"):
        fm.KFAC(nn.Linear(3, 2), nn.MSELoss(), batch, 0.1)
