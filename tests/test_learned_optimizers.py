"""Hyperparameters as an upper level's parameters: numbers, tensors, trees of them, one for each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree, optim
from funcmlo.describe import describe
from funcmlo.errors import DefinitionError, ParameterError
from funcmlo.operators import ravel
from tests.oracles import assert_agrees, bits, finite_difference

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

STEPS = 7  # radam changes its formula at its sixth step
START = {
    "first": {"w": torch.tensor([[0.3, -1.0], [0.6, 0.1]]).double(), "b": torch.tensor([0.2, -0.4]).double()},
    "second": torch.tensor([0.7, -0.3]).double(),
}
X = torch.tensor([[1.0, 0.2], [-0.4, 0.9], [0.3, -1.1], [0.8, 0.5]]).double()
Y = torch.tensor([2.0, -1.0, 0.5, 3.0]).double()


def predicted(net: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ net["first"]["w"] + net["first"]["b"]) @ net["second"]


def inner(net: Any) -> Tensor:
    return ((predicted(net, X[:3]) - Y[:3]) ** 2).mean() + 0.3 * sum((p**4).sum() for p in _tree.leaves(net))


def outer(rates: Any, net: Any) -> Tensor:
    return ((predicted(net, X) - Y) ** 2).mean()


def t64(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def like_start(low: float, high: float) -> Any:
    flat = torch.linspace(low, high, 8, dtype=torch.float64)
    return {"first": {"w": flat[:4].reshape(2, 2), "b": flat[4:6]}, "second": flat[6:]}


Case = tuple[Any, Callable[[Any], Any]]

# By name: the upper level's parameters, and the optimizer as a function of them. eps is large enough for the direction to
# depend on everything.
CASES: dict[str, Case] = {
    "sgd lr": ({"lr": t64(-2.0)}, lambda rates: optim.sgd(rates["lr"].exp())),
    "sgd all": (
        {"lr": t64(0.05), "mu": t64(0.8), "tau": t64(0.3), "wd": t64(0.1)},
        lambda rates: optim.sgd(rates["lr"], rates["mu"], rates["tau"], rates["wd"]),
    ),
    "nesterov": (
        {"mu": t64(0.8), "wd": t64(0.1)},
        lambda rates: optim.sgd(0.05, rates["mu"], weight_decay=rates["wd"], nesterov=True, maximize=False),
    ),
    "layers": (
        {
            "lr": {"first": t64(0.1), "second": t64(0.03)},
            "mu": {"first": {"w": t64(0.5), "b": t64(0.1)}, "second": t64(0.7)},
        },
        lambda rates: optim.sgd(rates["lr"], momentum=rates["mu"], weight_decay={"first": 0.1, "second": 0}),
    ),
    "meta-sgd": (like_start(0.02, 0.2), lambda rates: optim.sgd(rates)),
    "columns": (
        {"first": {"w": t64(0.1, 0.2), "b": t64(0.1)}, "second": t64(0.3)},
        lambda rates: optim.sgd(rates, momentum=0.5),
    ),
    "steps": (
        {"lr": torch.linspace(0.2, 0.05, STEPS).double()},
        lambda rates: optim.sgd(lambda t: rates["lr"][t], momentum=0.5),
    ),
    "fewer steps": ({"lr": t64(0.2, 0.1, 0.05)}, lambda rates: optim.adam(optim.per_step(rates["lr"]), eps=0.1)),
    "steps by layers": (
        {"first": torch.linspace(0.2, 0.05, STEPS).double(), "second": t64(0.1, 0.02)},
        lambda rates: optim.sgd(optim.per_step(rates)),
    ),
    "steps of each parameter": (
        _tree.map(lambda x: torch.stack([x, x / 2]), like_start(0.02, 0.2)),
        lambda rates: optim.sgd(optim.per_step(rates)),
    ),
    "a learned line": (
        {"from": t64(0.2), "to": t64(0.1), "power": t64(1.3)},
        lambda rates: optim.sgd(torchopt.schedule.polynomial_schedule(rates["from"], rates["to"], rates["power"], 5)),
    ),
    "a learned decay": (
        {"from": t64(0.2), "decay": t64(0.8)},
        lambda rates: optim.sgd(torchopt.schedule.exponential_decay(rates["from"], rates["decay"], end_value=0.01)),
    ),
    "adam all": (
        {"lr": t64(-2.5), "b1": t64(1.5), "b2": t64(2.5), "wd": t64(0.1), "eps": t64(0.1), "root": t64(0.2)},
        lambda rates: optim.adam(
            lr=rates["lr"].exp(),
            betas=(torch.sigmoid(rates["b1"]), torch.sigmoid(rates["b2"])),
            weight_decay=rates["wd"],
            eps=rates["eps"],
            eps_root=rates["root"],
        ),
    ),
    "adam layers": (
        {
            "b1": {"first": t64(0.8), "second": t64(0.7)},
            "b2": like_start(0.9, 0.95),
            "eps": {"first": t64(0.1), "second": 0.2},
        },
        lambda rates: optim.adam(0.1, (rates["b1"], rates["b2"]), rates["eps"]),
    ),
    "adamw all": (
        {"lr": t64(0.1), "b1": t64(0.8), "b2": t64(0.9), "wd": {"first": t64(0.3), "second": t64(0.1)}},
        lambda rates: optim.adamw(
            rates["lr"],
            (rates["b1"], rates["b2"]),
            0.1,
            rates["wd"],
            mask={"first": {"w": True, "b": False}, "second": True},
        ),
    ),
    "adamax all": (
        {"lr": t64(0.1), "b1": t64(0.8), "b2": t64(0.9), "wd": t64(0.1), "eps": t64(0.1)},
        lambda rates: optim.adamax(rates["lr"], (rates["b1"], rates["b2"]), rates["eps"], rates["wd"]),
    ),
    "radam all": (
        {"lr": t64(0.05), "b1": t64(0.8), "b2": t64(0.95), "wd": t64(0.1), "eps": t64(0.1)},
        lambda rates: optim.radam(rates["lr"], (rates["b1"], rates["b2"]), rates["eps"], rates["wd"]),
    ),
    "rmsprop all": (
        {"lr": t64(0.05), "alpha": t64(0.9), "eps": t64(0.1), "wd": t64(0.1), "mu": t64(0.5)},
        lambda rates: optim.rmsprop(rates["lr"], rates["alpha"], rates["eps"], rates["wd"], rates["mu"]),
    ),
    "centered all": (
        {"lr": t64(0.05), "alpha": t64(0.9), "eps": t64(0.1), "wd": t64(0.1), "mu": t64(0.5)},
        lambda rates: optim.rmsprop(
            rates["lr"], rates["alpha"], rates["eps"], rates["wd"], rates["mu"], True, nesterov=True
        ),
    ),
    "adagrad all": (
        {"lr": t64(0.1), "slow": t64(0.2), "eps": t64(0.1), "wd": t64(0.1)},
        lambda rates: optim.adagrad(rates["lr"], rates["slow"], rates["wd"], 0.1, rates["eps"]),
    ),
    "adadelta all": (
        {"lr": t64(0.5), "rho": t64(0.8), "eps": t64(0.1), "wd": t64(0.1)},
        lambda rates: optim.adadelta(rates["lr"], rates["rho"], rates["eps"], rates["wd"]),
    ),
    "clipping": (
        {"norm": t64(0.4), "lr": t64(0.1)},
        lambda rates: torchopt.chain(optim.clip_grad_norm(rates["norm"]), optim.sgd(rates["lr"], momentum=0.5)),
    ),
    "torchopt's sgd": (
        {"lr": t64(0.1), "mu": t64(0.5), "wd": t64(0.1)},
        lambda rates: torchopt.sgd(rates["lr"], momentum=rates["mu"], weight_decay=rates["wd"]),
    ),
    "torchopt's adam": (
        {"lr": t64(0.1), "b1": t64(0.8), "b2": t64(0.9)},
        lambda rates: torchopt.adam(rates["lr"], (rates["b1"], rates["b2"]), eps=0.1, eps_root=0.1),
    ),
}
# torchopt's own makers ask for a tensor's value, which vmap refuses.
LOOKED_AT = {"a learned decay", "torchopt's sgd", "torchopt's adam"}
# In forward mode and in parts, where the way matters: state beside the parameters, rates by step, branches on t.
KINDS = ["layers", "meta-sgd", "steps", "adam all", "radam all", "adagrad all", "clipping"]
WAYS = {"reverse": fm.ITD(), "forward": fm.ITD(mode="forward"), "mixed": fm.ITD(memory="mixed")}


def program(make: Callable[[Any], Any], response: fm.BestResponse) -> fm.Multilevel:
    return fm.Multilevel(
        fm.Level("net", inner, make, steps=STEPS, response=response), fm.Level("rates", outer, torchopt.sgd(0.1))
    )


def answered(name: str, way: str = "reverse") -> Any:
    rates, make = CASES[name]
    p = program(make, WAYS[way])
    return p.hypergradient(p.init({"net": START, "rates": floating(rates)}), {}, of="rates")


def floating(rates: Any) -> Any:
    """What a level may hold: a case may have a number among its rates."""
    return _tree.map(torch.as_tensor, _tree.map(lambda x: x if isinstance(x, Tensor) else t64(x), rates))


def after(make: Callable[[Any], Any], rates: Any) -> Tensor:
    """The whole program by hand, as a function of the rates."""
    optimizer = optim.mend(make(rates))
    net, state = START, optimizer.init(START)
    for _ in range(STEPS):
        updates, state = optimizer.update(torch.func.grad(inner)(net), state, params=net)
        net = optim.apply(net, updates)
    return outer(rates, net)


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in CASES for way in WAYS if way == "reverse" or name in KINDS]
)
def test_hypergradients_by_hyperparameters(name: str, way: str) -> None:
    rates, make = CASES[name]
    expected, error = finite_difference(lambda at: after(make, at), floating(rates), step=1e-4)
    # The differences' own error is in `error`; beside it there is rounding alone.
    assert_agrees(answered(name, way), expected, error, relative=1e-9)
    # Every hyperparameter counts: none is read and dropped. (Of a schedule, those that the steps reach.)
    assert (expected.abs() > 1e-8).all()


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOOKED_AT])
def test_vmap_over_rates_gives_what_a_loop_gives(name: str) -> None:
    rates, make = CASES[name]
    many = _tree.map(lambda x: torch.stack([x, 0.9 * x, 0.8 * x]), floating(rates))

    def slope(at: Any) -> Any:
        return torch.func.grad(lambda at: after(make, at))(at)

    mapped = torch.func.vmap(slope)(many)
    for i in range(3):
        one, chosen = slope(_tree.map(lambda x, i=i: x[i], many)), _tree.map(lambda x, i=i: x[i], mapped)
        # A few hundred roundings; vmap picks other kernels.
        assert torch.allclose(ravel(chosen), ravel(one), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["steps", "fewer steps", "steps by layers", "a learned decay", "adam all", "radam all"])
def test_states_of_their_own_are_mapped(name: str) -> None:
    rates, make = CASES[name]
    optimizer = optim.mend(make(floating(rates)))
    many = _tree.map(lambda x: torch.stack([x, 0.5 * x]), START)
    state = torch.func.vmap(optimizer.init)(many)
    for _ in range(3):
        updates, state = torch.func.vmap(lambda g, s, p: optimizer.update(g, s, params=p))(many, state, many)
    assert state[-1].step.shape == (2,) if name in {"steps", "fewer steps", "steps by layers"} else True
    one = optimizer.init(START)
    for _ in range(3):
        alone, one = optimizer.update(START, one, params=START)
    assert torch.allclose(ravel(_tree.map(lambda x: x[0], updates)), ravel(alone), rtol=1e-12)


MAKERS = ["sgd", "adam", "adamw", "adamax", "radam", "rmsprop", "adagrad", "adadelta"]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_give_what_numbers_give(maker: str, dtype: torch.dtype) -> None:
    names = {"sgd": "momentum dampening weight_decay", "rmsprop": "alpha eps weight_decay momentum"}
    names |= {"adagrad": "lr_decay weight_decay eps", "adadelta": "rho eps weight_decay"}
    chosen = dict.fromkeys(names.get(maker, "eps weight_decay").split(), 0.4)
    betas = {"betas": (0.7, 0.9)} if maker.startswith(("adam", "radam")) else {}
    params = _tree.map(lambda x: x.to(dtype), START)

    def outcome(optimizer: Any) -> Any:
        at, state = params, optimizer.init(params)
        for _ in range(STEPS):
            updates, state = optimizer.update(_tree.map(torch.sin, at), state, params=at)
            at = optim.apply(at, updates)
        assert _tree.mismatch(_tree.map(lambda x: x, at), params) is None
        return at

    def as_trees(x: Any) -> Any:
        return tuple(map(as_trees, x)) if isinstance(x, tuple) else {"first": x, "second": torch.tensor(x, dtype=dtype)}

    def as_tensors(x: Any) -> Any:
        return tuple(map(as_tensors, x)) if isinstance(x, tuple) else torch.tensor(x, dtype=dtype)

    make, settings = getattr(optim, maker), {"lr": 0.1, **chosen, **betas}
    expected = outcome(make(**settings))
    for change in (as_tensors, as_trees):
        came = outcome(make(**{name: change(x) for name, x in settings.items()}))
        # Sums in another order; a number is a double, a float32 tensor its rounding.
        assert torch.allclose(ravel(came), ravel(expected), rtol=1e-13 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.parametrize("of", [float, t64])
@pytest.mark.parametrize("maker", [name for name in MAKERS if name.startswith(("adam", "radam"))])
def test_branches_with_betas_of_their_own_are_optimized_apart(maker: str, of: Callable[[float], Any]) -> None:
    betas = {"first": (of(0.5), of(0.8)), "second": (of(0.9), of(0.99))}

    def made(params: Any, betas: Any) -> Any:
        optimizer = getattr(optim, maker)(0.1, betas)
        state = optimizer.init(params)
        for _ in range(STEPS):
            updates, state = optimizer.update(_tree.map(torch.sin, params), state, params=params)
            params = optim.apply(params, updates)
        return params

    whole = made(START, tuple({name: pair[i] for name, pair in betas.items()} for i in range(2)))
    assert bits(whole) == bits({name: made(START[name], pair) for name, pair in betas.items()})


@pytest.mark.parametrize("maker", MAKERS)
def test_half_precision_keeps_its_dtype_and_the_rates_theirs(maker: str) -> None:
    params = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones((), dtype=torch.bfloat16)}
    optimizer = getattr(optim, maker)(torch.tensor(0.1), weight_decay=torch.tensor(0.1))
    state = optimizer.init(params)
    updates, after_one = optimizer.update(params, state, params=params)
    assert _tree.mismatch(params, updates) is None
    assert _tree.mismatch(state, after_one) is None


def test_a_decay_near_one_is_not_rounded_beside_half_precision() -> None:
    # In bfloat16 0.999 is 1, and g² would never come in.
    params = torch.ones(3, dtype=torch.bfloat16)
    optimizer = optim.rmsprop(0.1, alpha=torch.tensor(0.999))
    _, state = optimizer.update(params, optimizer.init(params))
    assert torch.allclose(state[0].nu.float(), torch.full((3,), 0.001), rtol=2**-8)


def test_meta_sgd_learns_a_rate_for_each_parameter() -> None:
    # One step from 0 on Σ a_i (y_i − 1)² / 2 reaches its minimum exactly with the rates 1 / a_i.
    a = t64(0.5, 1.0, 4.0)
    p = fm.Multilevel(
        fm.Level(
            "y",
            lambda y: (a * (y - 1) ** 2).sum() / 2,
            lambda rates: optim.sgd(rates),
            response=fm.ITD(),
            init=lambda rates: torch.zeros(3).double(),
        ),
        fm.Level("rates", lambda rates, y: ((y - 1) ** 2).sum() / 2, optim.sgd(t64(4.0, 1.0, 0.0625))),
    )
    state = p.init({"y": torch.zeros(3).double(), "rates": torch.full((3,), 0.2).double()})
    # y_i = r_i a_i, so the upper cost is Σ (r_i a_i − 1)² / 2: its step with the rates 1 / a² is Newton's.
    state, _ = p.step(state, {})
    assert torch.allclose(state.params["rates"], 1 / a, rtol=1e-12)


@pytest.mark.parametrize("name", ["sgd lr", "meta-sgd", "steps", "adam all", "clipping"])
def test_estimators_that_cannot_see_the_optimizer_say_so(name: str) -> None:
    _, make = CASES[name]
    with pytest.warns(fm.FuncmloWarning, match=r"does not look at what its init, optimizer or projection reads of rates"):
        program(make, fm.AID(fm.CG(5)))


def test_what_is_made_here_needs_no_mending() -> None:
    for made in (optim.sgd(0.1), optim.mend(torchopt.adam(0.1)), optim.clip_grad_norm(1.0)):
        assert optim.mend(made) is made


@pytest.mark.parametrize("maker", MAKERS)
def test_optimizers_are_described_by_their_makers(maker: str) -> None:
    assert describe(getattr(optim, maker)(0.1)) == maker


TREE = {"a": torch.ones(3, 2), "b": {"c": torch.ones(2), "d": torch.ones(())}}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: optim.sgd({"a": 0.1}),
            r"lr is no prefix of the parameters' tree: nothing is given for the parameters\['b'\]",
        ),
        (lambda: optim.sgd({"a": 0.1, "b": 0.1, "e": 1}), r"lr\['e'\] has no counterpart"),
        (lambda: optim.sgd({"a": 0.1, "b": {"c": 0.1}}), r"nothing is given for the parameters\['b'\]\['d'\]"),
        (lambda: optim.sgd({"a": {"w": 0.1}, "b": 0.1}), r"lr\['a'\]\['w'\] has no counterpart"),
        (
            lambda: optim.sgd({"a": torch.ones(3), "b": 0.1}),
            r"lr has shape \(3,\) where the parameters\['a'\] have shape \(3, 2\)",
        ),
        (lambda: optim.sgd({"a": 0.1, "b": torch.ones(2)}), r"lr has shape \(2,\) where it stands for several leaves"),
        (lambda: optim.sgd(torch.ones(5)), r"shape \(5,\) where it stands for several leaves.*fm\.optim\.per_step\(rates\)"),
        (lambda: optim.sgd({"a": 0.1, "b": {"c": 0.1, "d": torch.ones(2)}}), r"\['b'\]\['d'\] have shape \(\)"),
        (lambda: optim.sgd(0.1, momentum={"a": 0.1}), r"momentum is no prefix"),
        (lambda: optim.sgd(0.1, 0.5, {"a": 0.1}), r"dampening is no prefix"),
        (lambda: optim.sgd(0.1, weight_decay={"a": 0.1}), r"weight_decay is no prefix"),
        (lambda: optim.adam(betas=({"a": 0.1}, 0.9)), r"betas\[0\] is no prefix"),
        (lambda: optim.adam(betas=(0.1, {"a": 0.1})), r"betas\[1\] is no prefix"),
        (lambda: optim.adam(eps={"a": 0.1}), r"eps is no prefix"),
        (lambda: optim.rmsprop(alpha={"a": 0.1}), r"alpha is no prefix"),
        (lambda: optim.adadelta(rho={"a": 0.1}), r"rho is no prefix"),
        (lambda: optim.adamw(mask={"a": True}), r"mask is .* no prefix"),
    ],
)
def test_trees_that_do_not_fit_are_refused(make: Callable[[], Any], match: str) -> None:
    optimizer = make()
    with pytest.raises((ParameterError, DefinitionError), match=match):
        optimizer.update(TREE, optimizer.init(TREE), params=TREE)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: optim.sgd(-0.1), r"sgd: lr=-0\.1; expected a number at least 0"),
        (lambda: optim.sgd({"a": 0.1, "b": -1}), r"sgd: lr\['b'\]=-1"),
        (lambda: optim.sgd(torch.tensor(1)), r"sgd: lr is a tensor of torch\.int64; expected floating point"),
        (lambda: optim.sgd("0.1"), r"sgd: lr is str; expected a number"),
        (lambda: optim.sgd(True), r"sgd: lr is bool"),
        (lambda: optim.sgd(float("nan")), r"sgd: lr=nan"),
        (lambda: optim.sgd(None), r"sgd: lr is None"),
        (lambda: optim.sgd(0.1, -1), r"sgd: momentum=-1"),
        (lambda: optim.sgd(0.1, 0.5, -1), r"sgd: dampening=-1"),
        (lambda: optim.sgd(0.1, weight_decay=-1), r"sgd: weight_decay=-1"),
        (lambda: optim.sgd(0.1, nesterov=True), r"nesterov=True needs a momentum"),
        (lambda: optim.sgd(0.1, 0.5, 0.1, nesterov=True), r"and no dampening"),
        (lambda: optim.adam(betas=(0.9, 1.0)), r"adam: betas\[1\]=1\.0; expected a number in \[0, 1\)"),
        (lambda: optim.adamw(betas=(1.0, 0.9)), r"adamw: betas\[0\]=1\.0"),
        (lambda: optim.adam(betas=0.9), r"adam: betas is float; expected the pair"),
        (lambda: optim.adam(betas=(0.9,)), r"adam: betas is 1 of them"),
        (lambda: optim.adam(eps=-1), r"adam: eps=-1"),
        (lambda: optim.adam(eps_root=-1), r"adam: eps_root=-1"),
        (lambda: optim.radam(weight_decay=-1), r"radam: weight_decay=-1"),
        (lambda: optim.rmsprop(alpha=-1), r"rmsprop: alpha=-1"),
        (lambda: optim.rmsprop(nesterov=True), r"rmsprop: nesterov=True needs a momentum"),
        (lambda: optim.adagrad(lr_decay=-1), r"adagrad: lr_decay=-1"),
        (lambda: optim.adagrad(initial_accumulator_value=-1), r"adagrad: initial_accumulator_value=-1"),
        (lambda: optim.adadelta(rho=1.0), r"adadelta: rho=1\.0"),
        (lambda: optim.per_step(0.1), r"per_step: rates is float"),
        (lambda: optim.per_step({"a": torch.tensor(0.1)}), r"per_step: rates\['a'\] is a tensor of shape \(\)"),
        (lambda: optim.per_step(torch.ones(0)), r"shape \(0,\)"),
        (lambda: optim.per_step(torch.tensor([1, 2])), r"torch\.int64"),
        (lambda: optim.clip_grad_norm("1"), r"clip_grad_norm: max_norm='1'"),
        (lambda: optim.mend(torchopt.register_hook(lambda g: g)), r"register_hook .* has no meaning in a pure optimizer"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(DefinitionError, match=match):
        make()


def test_a_schedule_must_return_a_rate() -> None:
    optimizer = optim.sgd(lambda t: None)
    with pytest.raises(DefinitionError, match=r"sgd: lr\(t\) is None; expected a number"):
        optimizer.update(TREE, optimizer.init(TREE))


def test_weight_decay_needs_the_parameters() -> None:
    optimizer = optim.sgd(0.1, weight_decay=0.1)
    with pytest.raises(DefinitionError, match=r"weight decay needs the parameters"):
        optimizer.update(TREE, optimizer.init(TREE))


def test_schedules_see_the_steps_number() -> None:
    seen: list[Tensor] = []

    def rate(t: Tensor) -> float:
        seen.append(t)
        return 0.1

    optimizer = optim.sgd(rate)
    state = optimizer.init(TREE)
    for _ in range(3):
        _, state = optimizer.update(TREE, state)
    # Once a step, not once a leaf.
    assert [(int(t), t.shape, t.dtype) for t in seen] == [(i, torch.Size([]), torch.int64) for i in range(3)]


def test_a_mask_may_be_a_tree() -> None:
    # torchopt's own takes the names of a dict, which are true, for the mask.
    optimizer = optim.mend(torchopt.adamw(0.1, weight_decay=0.5, mask={"a": True, "b": False}))
    plain = optim.adam(0.1)
    decayed, _ = optimizer.update(TREE, optimizer.init(TREE), params=TREE)
    expected, _ = plain.update(TREE, plain.init(TREE))
    assert bits(decayed["b"]) == bits(expected["b"])
    assert torch.allclose(decayed["a"], expected["a"] - 0.05)


def test_parts_from_elsewhere_inside_a_flat_chain_get_their_list() -> None:
    own = torchopt.base.GradientTransformation(
        lambda p: (), lambda g, s, *, params=None, inplace=True: ([2 * x for x in g], s)
    )
    optimizer = optim.mend(torchopt.combine.chain_flat(own, torchopt.sgd(1.0)))
    updates, _ = optimizer.update(TREE, optimizer.init(TREE))
    assert bits(updates) == bits(_tree.map(lambda x: -2 * x, TREE))
