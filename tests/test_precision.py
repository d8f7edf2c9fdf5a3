"""Costs in 16 bits: hypergradients to that precision, in the parameters' dtypes; loss scaling; nothing sneaks in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _diff, _tree, precision
from tests.registry import ESTIMATORS

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# Estimator -> (itself, inner steps, the order p of the error εᵖ in the compute dtype's epsilon). Derivatives are as good as
# the arithmetic, ε; a central difference whose step is √ε (1 + ‖y‖) has the truncation ε (1 + ‖y‖)² and the rounding √ε,
# and a one-sided one the truncation √ε: p = 1/2. The level's Hessian lies between 1 and 3, so condition numbers do not show.
CASES: dict[str, tuple[fm.BestResponse, int, float]] = {
    "itd": (fm.ITD(), 8, 1),
    "itd forward": (fm.ITD(mode="forward"), 8, 1),
    "itd mixed": (fm.ITD(memory="mixed"), 8, 1),
    "itd recompute": (fm.ITD(memory="recompute"), 8, 1),
    "cg": (fm.AID(fm.CG(20)), 30, 1),
    "cg forward": (fm.AID(fm.CG(20), curvature=fm.Hessian("forward")), 30, 1),
    "cg recompute": (fm.AID(fm.CG(20), curvature=fm.Hessian("recompute")), 30, 1),
    "cg difference": (fm.AID(fm.CG(20), curvature=fm.Hessian("finite_difference")), 30, 0.5),
    "cg cross": (fm.AID(fm.CG(20), cross="finite_difference"), 30, 0.5),
    "neumann": (fm.AID(fm.Neumann(30, scale=0.5)), 30, 1),
    "minres": (fm.AID(fm.MINRES(20)), 30, 1),
    "gmres": (fm.AID(fm.GMRES(20)), 30, 1),
    "fixed point": (fm.AID(fm.GMRES(20), curvature="fixed_point"), 30, 1),
    "nystrom": (fm.AID(fm.Nystrom(30, damping=1e-2)), 30, 1),
    "direct": (fm.AID(fm.Direct()), 30, 1),
    "finite difference": (fm.FiniteDifference(), 30, 0.5),
    "sama": (fm.SAMA(), 30, 0.5),
    "one step": (fm.OneStep(), 8, 1),
    "perturbed solve": (fm.PerturbedSolve(20), 8, 0.5),
    "perturbed central": (fm.PerturbedSolve(20, central=True), 8, 0.5),
    "forward gradient": (fm.ForwardGradient(10), 8, 1),
    "penalty": (fm.Penalty(steps=30), 30, 0.5),
}
# The errors are this many times εᵖ at most: matrix products round their operands and their results, a few times along the
# network and its derivatives, and each of these is an ε.
TIMES = 4.0


def program(
    dtype: torch.dtype,
    response: fm.BestResponse,
    steps: int,
    *,
    autocast: torch.dtype | None = None,
    loss_scale: float | None = None,
    size: float = 1.0,
    rate: float = 0.3,
    inside: torch.dtype | None = None,
) -> tuple[fm.Multilevel, fm.State]:
    """A two-layer network, pulled to where it began, whose data are weighed by the level above."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    data = [t.to(dtype) for t in (normal(64, 10), normal(64, 3), normal(64, 10), normal(64, 3))]
    begin = {"a": (normal(10, 8) / 3).to(dtype), "b": (normal(8, 3) / 3).to(dtype)}
    weights = (normal(64) / 2).to(dtype)

    def net(w: dict[str, Tensor], x: Tensor) -> Tensor:
        with nullcontext() if inside is None else torch.autocast("cpu", dtype=inside):
            return torch.tanh(x @ w["a"]) @ w["b"]

    def lower(y: dict[str, Tensor], x: Tensor) -> Tensor:
        fit = (torch.sigmoid(x)[:, None] * (net(y, data[0]) - data[1]) ** 2).mean()
        return size * (fit + sum(((y[k] - begin[k]) ** 2).sum() for k in y) / 2)

    def upper(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return size * ((net(y, data[2]) - data[3]) ** 2).mean()

    own = {"autocast": autocast, "loss_scale": loss_scale}
    made = fm.Multilevel(
        fm.Level("y", lower, torchopt.sgd(rate / size), steps=steps, response=response, **own),
        fm.Level("x", upper, torchopt.sgd(0.1), **own),
    )
    return made, made.init({"y": begin, "x": weights})


def hypergradient(*args: object, **kwargs: object) -> Tensor:
    made, state = program(*args, **kwargs)  # type: ignore[arg-type]
    gradient: Tensor = made.hypergradient(state, {}, of="x")
    return gradient


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.to(F64) - b.to(F64)).norm() / b.to(F64).norm())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("autocast", [BF16, F16], ids=str)
def test_hypergradients_under_autocast(name: str, autocast: torch.dtype) -> None:
    response, steps, order = CASES[name]
    found = hypergradient(F32, response, steps, autocast=autocast)
    assert found.dtype == F32
    epsilon = torch.finfo(autocast).eps
    error = relative(found, hypergradient(F64, response, steps))
    assert error <= TIMES * epsilon**order
    assert error > torch.finfo(F32).eps * 100  # it was computed in 16 bits indeed


@pytest.mark.parametrize("name", ["finite difference", "sama", "cg cross", "cg difference", "perturbed solve"])
def test_differences_take_their_step_from_the_compute_dtype(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    response, steps, _ = CASES[name]
    truth = hypergradient(F64, response, steps)
    known = relative(hypergradient(F32, response, steps, autocast=BF16), truth)
    monkeypatch.setattr(precision, "epsilon", lambda tree, autocast: _tree.coarsest_epsilon(tree))
    assert relative(hypergradient(F32, response, steps, autocast=BF16), truth) > 3 * known


def test_epsilon_is_of_what_is_computed_in() -> None:
    assert precision.epsilon(torch.zeros(1), BF16) == torch.finfo(BF16).eps
    assert precision.epsilon(torch.zeros(1), None) == torch.finfo(F32).eps
    assert precision.epsilon(torch.zeros(1, dtype=F64), BF16) == torch.finfo(F64).eps  # autocast leaves it alone
    assert precision.epsilon([torch.zeros(1, dtype=F64), torch.zeros(1)], F16) == torch.finfo(F16).eps


def test_autocast_leaves_float64_alone() -> None:
    assert torch.equal(hypergradient(F64, fm.ITD(), 8, autocast=BF16), hypergradient(F64, fm.ITD(), 8))


@pytest.mark.parametrize("name", ["itd", "cg", "gmres", "direct", "finite difference", "penalty"])
def test_an_autocast_around_the_call_reaches_the_costs_alone(name: str) -> None:
    response, steps, _ = CASES[name]
    made, state = program(F32, response, steps)
    with torch.autocast("cpu", dtype=BF16):
        around = made.hypergradient(state, {}, of="x")
        stepped, metrics = made.step(state, {})
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(around, hypergradient(F32, response, steps, autocast=BF16))
    alone, state = program(F32, response, steps, autocast=BF16)
    expected, _ = alone.step(state, {})
    assert all(map(torch.equal, _tree.leaves(stepped.params), _tree.leaves(expected.params)))
    assert metrics["x"]["cost"].dtype == F32


def test_a_level_with_its_own_autocast_keeps_it() -> None:
    made, state = program(F32, fm.ITD(), 8, autocast=F16)
    with torch.autocast("cpu", dtype=BF16):
        around = made.hypergradient(state, {}, of="x")
    assert torch.equal(around, hypergradient(F32, fm.ITD(), 8, autocast=F16))


@pytest.mark.parametrize("name", CASES)
def test_an_autocast_inside_the_loss(name: str) -> None:
    response, steps, order = CASES[name]
    if order < 1:  # no one knows of it, so the steps are float32's
        return
    error = relative(hypergradient(F32, response, steps, inside=BF16), hypergradient(F64, response, steps))
    assert 1e-4 < error <= TIMES * torch.finfo(BF16).eps ** order


def test_solution_maps_under_autocast() -> None:
    """In the forward pass, in the backward pass and in both: the arithmetic between the costs is never cast."""
    a = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) / 4

    def loss(y: Tensor, x: Tensor) -> Tensor:
        return ((y - torch.tanh(a @ y) - x) ** 2).sum()

    def slope(solve: Callable[..., Tensor], cast: bool, back: bool) -> Tensor:
        x = torch.linspace(0.1, 0.6, 6).requires_grad_()
        with torch.autocast("cpu", dtype=BF16, enabled=cast):
            y = solve(torch.zeros(6), x)
            assert y.dtype == F32
        with torch.autocast("cpu", dtype=BF16, enabled=back):
            (found,) = torch.autograd.grad(y.sum(), x)
        return found

    for solve in (
        fm.argmin(loss, torchopt.sgd(0.1), steps=60, response=fm.AID(fm.Direct())),
        fm.fixed_point(lambda y, x: torch.tanh(a @ y) + x, steps=60, response=fm.AID(fm.GMRES(12))),
    ):
        plain, cast = slope(solve, False, False), slope(solve, True, False)
        assert 1e-5 < relative(cast, plain) <= TIMES * torch.finfo(BF16).eps
        assert torch.equal(slope(solve, True, True), cast)
        assert torch.equal(slope(solve, False, True), plain)


@pytest.mark.parametrize("name", [name for name in CASES if name != "penalty"])
def test_a_power_of_two_leaves_float32_to_the_bit(name: str) -> None:
    response, steps, _ = CASES[name]
    assert torch.equal(hypergradient(F32, response, steps, loss_scale=2.0**12), hypergradient(F32, response, steps))


# With the cost 1e-7 times as large its gradients lie under float16's least number, 6e-8; rate / size keeps the run as it
# was, so that the step's derivative multiplies by 3e6, which a step that is differentiated whole does not bear.
WHOLE = ("itd", "itd recompute", "one step", "fixed point", "penalty")


@pytest.mark.parametrize("name", [name for name in CASES if name not in WHOLE])
def test_loss_scaling_brings_back_what_float16_loses(name: str) -> None:
    response, steps, order = CASES[name]
    truth = hypergradient(F64, response, steps, size=1e-7)
    lost = hypergradient(F32, response, steps, size=1e-7, autocast=F16)
    found = hypergradient(F32, response, steps, size=1e-7, autocast=F16, loss_scale=2.0**28)
    assert relative(lost, truth) > 0.5
    assert relative(found, truth) <= TIMES * torch.finfo(F16).eps ** order


@pytest.mark.parametrize("rate", [1e-4, 1.0])
@pytest.mark.parametrize("name", ["itd", "itd recompute", "one step", "itd mixed"])
def test_loss_scaling_through_the_steps(name: str, rate: float) -> None:
    response = CASES[name][0]
    truth = hypergradient(F64, response, 8, rate=rate)
    found = hypergradient(F32, response, 8, rate=rate, autocast=F16, loss_scale=2.0**12)
    assert relative(found, truth) <= TIMES * torch.finfo(F16).eps


def test_loss_scaling_in_updates() -> None:
    """The update's gradient is divided in the parameters' precision: 3e-9 is nothing in float16."""

    def loss(y: Tensor) -> Tensor:
        return (1e-9 * (torch.ones(1, 4) @ y)).sum()

    def moved(scale: float | None) -> Tensor:
        made = fm.Multilevel(fm.Level("y", loss, torchopt.sgd(1.0), autocast=F16, loss_scale=scale))
        state, _ = made.step(made.init({"y": torch.zeros(4, 1)}), {})
        found: Tensor = state.params["y"]
        return found

    assert not moved(None).any()
    # 2¹⁵ · 1e-9 lies between float16's least numbers, which are 6e-8 apart.
    assert torch.allclose(moved(2.0**15), torch.full((4, 1), -1e-9), rtol=3e-8 / (2**15 * 1e-9), atol=0)


def test_a_scale_beyond_the_range_is_named() -> None:
    made, state = program(F32, fm.AID(fm.CG(5)), 8, autocast=F16, loss_scale=2.0**40)
    with pytest.raises(
        fm.NonFiniteError, match=r"its cost is nan at inner step 2 .* Or lower loss_scale=1\.09951e\+12 of level 'y'"
    ):
        made.step(state, {})
    lower, upper = made.levels
    made = fm.Multilevel(replace(lower, loss_scale=None), upper)
    with pytest.raises(fm.NonFiniteError, match=r"hypergradient is not finite .* Or lower loss_scale="):
        made.hypergradient(state, {}, of="x")


def test_products_in_range_are_the_products() -> None:
    a = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    for size in (0.0, 1e-25, 1.0, 1e25):
        v = size * torch.tensor([1.0, -2.0, 3.0], dtype=F64)
        seen: list[Tensor] = []

        def linear(operand: list[Tensor], seen: list[Tensor] = seen) -> list[Tensor | None]:
            seen.extend(operand)
            return [a @ operand[0], None]

        with precision.scaled(2.0**10):
            found = precision.in_range(linear, [v])
        assert found[1] is None
        assert torch.equal(found[0], a @ v)  # type: ignore[arg-type]
        assert size == 0 or 2.0**10 <= float(seen[-1].abs().max()) < 2.0**11
        with precision.scaled(2.0**10):
            precision.in_range(linear, [v], forward=True)
        assert size == 0 or 1 <= float(seen[-1].abs().max()) < 2


def test_scaling_leaves_higher_derivatives_alone() -> None:
    """With f = x⁴/24, f′ = x³/6, f″ = x²/2, f‴ = x; a node that scales in secret would be off by S from f″ on."""

    def derivative(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def of(x: Tensor) -> Tensor:
            return _diff.value_and_grads(lambda at: (f(at), None), [x])[2][0]

        return of

    first = derivative(lambda x: x**4 / 24)
    second, third = derivative(first), derivative(derivative(first))
    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    with precision.scaled(2.0**20), torch.enable_grad():
        assert [float(f(x).detach()) for f in (first, second, third)] == pytest.approx([4.5, 4.5, 3.0], rel=1e-14)
    with precision.scaled(2.0**20):
        assert float(torch.func.grad(second)(torch.tensor(3.0, dtype=F64))) == pytest.approx(3.0, rel=1e-14)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("autocast", torch.float32, "expected torch.bfloat16, torch.float16 or None"),
        ("autocast", True, "autocast=True"),
        ("loss_scale", 0.0, "expected a positive number"),
        ("loss_scale", True, "loss_scale=True"),
        ("loss_scale", float("inf"), "loss_scale=inf"),
    ],
)
def test_fields_without_a_meaning(field: str, value: object, match: str) -> None:
    with pytest.raises(fm.DefinitionError, match=match):
        fm.Level("y", lambda y: y.sum(), torchopt.sgd(0.1), **{field: value})


KRYLOV = {"cg nystrom", "minres", "gmres", "fixed point gmres"}
MIXED = {"half": F16, "brain": BF16, "single": F32, "double": F64}


def mixed_program(dtypes: dict[str, torch.dtype], response: fm.BestResponse) -> tuple[fm.Multilevel, fm.State]:
    """½‖y − x‖² over leaves of several dtypes, above it ½‖y‖²: y* = x, and the hypergradient is x."""

    def apart(y: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
        return sum((((y[k] - x[k]).double() ** 2).sum() for k in dtypes), torch.zeros((), dtype=F64)) / 2

    made = fm.Multilevel(
        fm.Level("y", apart, torchopt.sgd(1.0), steps=2, response=response),
        fm.Level("x", lambda x, y: apart(y, {k: torch.zeros_like(v) for k, v in y.items()}), torchopt.sgd(0.5)),
    )
    values = {k: torch.tensor([0.5, -2.0], dtype=dtype) for k, dtype in dtypes.items()}
    return made, made.init({"y": {k: torch.ones(2, dtype=d) for k, d in dtypes.items()}, "x": values})


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtypes", [MIXED, {"only": BF16}], ids=["mixed", "pure"])
def test_each_leaf_keeps_its_dtype(name: str, dtypes: dict[str, torch.dtype]) -> None:
    response = ESTIMATORS[name](1.0, 2 * len(dtypes))
    made, state = mixed_program(dtypes, response)
    found = made.hypergradient(state, {}, of="x")
    assert {k: v.dtype for k, v in found.items()} == dtypes
    after, _ = made.step(state, {})
    assert not _tree.mismatch(state.params, after.params)
    assert not _tree.mismatch(state.optimizer, after.optimizer)
    if response.claims.stochastic and response.requires == "replay":
        return  # means over random directions: the dtype is what is asked for here
    for k, g in found.items():
        # Of the order of the coarsest leaf's epsilon for differences over all leaves, else of the leaf's own, damped ones
        # included.
        # A Krylov solver of all leaves together stops at the coarsest leaf's epsilon.
        order = 0.5 if name in {"finite difference", "sama", "cg cross", "cg difference", "penalty"} else 1
        epsilon = max(torch.finfo(d).eps for d in (dtypes.values() if order < 1 or name in KRYLOV else [dtypes[k]]))
        assert relative(g, state.params["x"][k]) <= max(TIMES * epsilon**order, 1e-8)


@pytest.mark.parametrize("name", CASES)
def test_float64_throughout(name: str) -> None:
    """Under a float32 and under a float64 default: a constant of the default's dtype would show."""
    response, steps, _ = CASES[name]
    before = torch.get_default_dtype()
    found = []
    for default in (F32, F64):
        torch.set_default_dtype(default)
        try:
            made, state = program(F64, response, steps)
            gradient, stats = made.hypergradient(state, {}, of="x", with_stats=True)
            after, metrics = made.step(state, {})
            found.append((gradient, after.params, metrics["x"]["cost"], metrics["x"]["gradient_norm"], stats["y"].residual))
        finally:
            torch.set_default_dtype(before)
    for a, b in zip(_tree.leaves(found[0]), _tree.leaves(found[1]), strict=True):
        assert not isinstance(a, Tensor) or (a.dtype == F64 and torch.equal(a, b))
        assert isinstance(a, Tensor) or a == b


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("name", CASES)
def test_levels_on_different_devices(name: str) -> None:
    response, steps, _ = CASES[name]

    def lower(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        return ((y - x.to(y.device) - batch) ** 2).sum() / 2

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return (y.to(x.device) ** 2).sum() / 2

    made = fm.Multilevel(
        fm.Level("y", lower, torchopt.sgd(0.5), steps=steps, response=response),
        fm.Level("x", upper, torchopt.sgd(0.5)),
    )
    state = made.init({"y": torch.zeros(3, device="cuda", dtype=F64), "x": torch.ones(3, dtype=F64)})
    batches = {"y": torch.zeros(3, device="cuda", dtype=F64)}
    gradient = made.hypergradient(state, batches, of="x")
    after, _ = made.step(state, batches)
    assert gradient.device.type == "cpu"
    assert after.params["x"].device.type == "cpu"
    assert after.params["y"].device.type == "cuda"


def test_costs_come_back_in_the_parameters_precision() -> None:
    """A cost that is itself bfloat16 is 0.5 % off; its sums and differences need not be."""
    x = torch.linspace(0.1, 1.0, 12).view(4, 3)
    for dtype in (F32, BF16):
        made = fm.Multilevel(fm.Level("y", lambda y: (x.to(y.dtype) @ y).sum(), torchopt.sgd(0.1), autocast=BF16))
        after, metrics = made.step(made.init({"y": torch.ones(3, 2, dtype=dtype)}), {})
        assert metrics["y"]["cost"].dtype == F32
        assert after.params["y"].dtype == dtype


def test_gauss_newton_under_autocast() -> None:
    """A linear model's Gauss-Newton matrix is its Hessian, and its outputs' curvature is not rounded."""
    a = torch.randn(12, 4, generator=torch.Generator().manual_seed(2)) / 3

    def outputs(y: Tensor) -> Tensor:
        return a.to(y.dtype) @ y

    def loss(f: Tensor) -> Tensor:
        assert f.dtype != BF16
        return (f**2).sum() / 2

    def found(dtype: torch.dtype, autocast: torch.dtype | None) -> Tensor:
        def cost(y: Tensor, x: Tensor) -> Tensor:
            return (outputs(y) ** 2).sum() / 2 - (y * x).sum() + (y**2).sum() / 2

        response = fm.AID(fm.CG(20, damping=1.0), curvature=fm.GaussNewton(outputs, loss))
        made = fm.Multilevel(
            fm.Level("y", cost, torchopt.sgd(0.1), steps=2, response=response, autocast=autocast),
            fm.Level("x", lambda x, y: (y * torch.arange(1.0, 5.0, dtype=y.dtype)[:, None]).sum(), torchopt.sgd(0.1)),
        )
        start = torch.ones(4, 1, dtype=dtype)
        gradient: Tensor = made.hypergradient(made.init({"y": start, "x": start}), {}, of="x")
        return gradient

    truth = torch.linalg.solve((a.T @ a).to(F64) + torch.eye(4, dtype=F64), torch.arange(1.0, 5.0, dtype=F64)[:, None])
    assert relative(found(F64, None), truth) < 1e-12 + torch.finfo(F32).eps * 10  # a is float32's
    assert relative(found(F32, BF16), truth) <= TIMES * torch.finfo(BF16).eps


def test_a_scale_ends_with_its_block() -> None:
    seen: list[Tensor] = []
    with pytest.raises(ZeroDivisionError), precision.scaled(2.0**10):
        raise ZeroDivisionError
    precision.in_range(lambda v: seen.extend(v) or [None], [torch.ones(1)])  # type: ignore[func-returns-value]
    assert torch.equal(seen[0], torch.ones(1))
