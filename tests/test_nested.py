"""composition="nested" as programs run it: against central differences of the program solved again."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcmlo as fm
from tests.hierarchies import Hierarchy, hierarchies
from tests.oracles import assert_agrees, bits, fingerprint, finite_difference
from tests.registry import OPTIMIZERS, vector_like

AID = fm.AID(fm.CG(20, tol=1e-14))
EXACT = {"cg": AID, "direct": fm.AID(fm.Direct()), "neumann": fm.AID(fm.Neumann(25, scale=0.9)), "itd": fm.ITD()}
PAIRS = [*itertools.product(["cg", "itd"], repeat=2), ("neumann", "direct"), ("direct", "neumann")]
B, D = vector_like((torch.zeros(3, 3).double(), torch.zeros(3, 3).double()), 0)


def lowest(z, y, x):
    return 0.5 * z @ z - 0.2 * z @ B @ torch.sin(y) - 0.3 * (z * x).sum() + 0.02 * torch.cos(z).sum()


def middle(y, z, x):
    return 0.5 * y @ y - 0.3 * y @ D @ x + 0.2 * (y * torch.tanh(z)).sum() + 0.1 * (z**2).sum()


def reads_one(x, y):
    return torch.cos(y).sum() + 0.1 * (x**2).sum()


def reads_both(x, y, z):
    return torch.cos(y).sum() + torch.sin(z).sum() + 0.1 * (x**2).sum()


def chain(
    top: Callable, inner: fm.BestResponse, outer: fm.BestResponse, steps: int = 18, optimizer: object = None, **settings
) -> tuple[fm.Multilevel, fm.State]:
    optimizer = optimizer or torchopt.sgd(0.88)
    program = fm.Multilevel(
        fm.Level("z", lowest, optimizer, steps=steps, response=inner),
        fm.Level("y", middle, optimizer, steps=steps, response=outer, **settings),
        fm.Level("x", top, torchopt.sgd(0.1)),
        composition="nested",
    )
    return program, program.init({name: vector_like(torch.zeros(3).double(), i) for i, name in enumerate("zyx")})


def solved_again(program: fm.Multilevel, state: fm.State, batches: dict, level: str = "x") -> Callable[[object], Tensor]:
    """A top level's cost after everything below it ran again."""

    def value(params: object) -> Tensor:
        moved = replace(state, params={**state.params, level: params})
        return program.step(moved, batches)[1][level]["cost"]

    return value


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_every_pair_of_estimators_in_a_chain(inner: str, outer: str) -> None:
    program, state = chain(reads_both, EXACT[inner], EXACT[outer], steps=13)
    answer, stats = program.hypergradient(state, {}, of="x", with_stats=True)
    reference, error = finite_difference(solved_again(program, state, {}), state.params["x"], step=1e-2)
    assert_agrees(answer, reference, error, relative=1e-9)
    for name, response in (("z", inner), ("y", outer)):
        assert (name in stats) == (response != "itd")  # unrolled steps are no products of their own
        assert name not in stats or (stats[name].hvps >= stats[name].products >= 1 and stats[name].converged)


@given(seed=st.integers(0, 2**20), steps=st.integers(1, 3))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_itd_at_every_level_is_the_derivative_of_what_ran(optimizer: str, seed: int, steps: int) -> None:
    # Converged or not, with the optimizers' states and the lowest level's warm starts in the graph.
    program, state = chain(reads_both, fm.ITD(), fm.ITD(), steps, OPTIMIZERS[optimizer]())
    state = replace(state, params={k: vector_like(v, seed + i) for i, (k, v) in enumerate(state.params.items())})
    state, _ = program.step(state, {})
    answer = program.hypergradient(state, {}, of="x")
    reference, error = finite_difference(solved_again(program, state, {}), state.params["x"], step=1e-4)
    # Adam's second moments near zero leave little that is smooth: then the reference says how little it knows.
    assert ((torch.as_tensor(answer) - reference).abs() <= 1e-6 * (1 + reference.norm()) + 4 * error).all()


def net(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"] + params["b"]) @ params["out"]


@pytest.mark.parametrize("inner", [fm.ITD(), AID], ids=["itd", "aid"])
def test_small_nets_on_batches(inner: fm.BestResponse) -> None:
    # A net is pretrained on weighted examples, another one is drawn to it, and the weights answer for the second.
    shapes = {"w": torch.zeros(2, 3).double(), "b": torch.zeros(3).double(), "out": torch.zeros(3).double()}
    data = vector_like((torch.zeros(6, 5, 2).double(), torch.zeros(6, 5).double()), 1)

    def pretrain(pre, weights, own, batch):
        x, y = batch
        pull = sum(((pre[k] - 0.1 * own[k]) ** 2).sum() for k in pre)
        return (torch.sigmoid(weights) * (net(pre, x) - y) ** 2).mean() / 4 + pull

    def finetune(own, pre, batch):
        x, y = batch
        return ((net(own, x) - y) ** 2).mean() / 4 + sum(((own[k] - pre[k]) ** 2).sum() for k in own)

    def reweight(weights, own):
        return ((net(own, data[0][5]) - data[1][5]) ** 2).mean() + 0.01 * (weights**2).sum()

    optimizer = torchopt.sgd(0.45)
    program = fm.Multilevel(
        fm.Level("pre", pretrain, optimizer, steps=10, response=inner),
        fm.Level("own", finetune, optimizer, steps=10, response=AID),
        fm.Level("weights", reweight, torchopt.adam(0.1)),
        composition="nested",
    )
    start = {
        "pre": vector_like(shapes, 2),
        "own": vector_like(shapes, 3),
        "weights": vector_like(torch.zeros(5).double(), 4),
    }
    state = program.init(start)
    batches = {"pre": (data[0][0], data[1][0]), "own": lambda t: (data[0][1], data[1][1])}
    state, _ = program.step(state, batches)
    answer = program.hypergradient(state, batches, of="weights")
    value = solved_again(program, state, batches, "weights")
    reference, error = finite_difference(value, state.params["weights"], step=1e-2)
    assert_agrees(answer, reference, error, relative=1e-6)
    if isinstance(inner, fm.ITD):
        return
    own, error = finite_difference(lambda own: pretrained_cost(program, state, batches, own), state.params["own"], step=1e-2)
    assert_agrees(program.hypergradient(state, batches, of="own"), own, error, relative=1e-6)


def pretrained_cost(program: fm.Multilevel, state: fm.State, batches: dict, own: object) -> Tensor:
    """The middle level's cost at its first update, the level below solved for it."""
    first = fm.Multilevel(
        *program.levels[:1],
        fm.Level("own", program.levels[1].loss, torchopt.sgd(0.0)),
        replace_top(program),
        composition="nested",
    )
    fresh = first.init(state.params)  # the state of these optimizers
    moved = replace(state, params={**state.params, "own": own}, optimizer=fresh.optimizer)
    return first.step(moved, batches)[1]["own"]["costs"][0]


def replace_top(program: fm.Multilevel) -> fm.Level:
    return fm.Level("weights", program.levels[2].loss, torchopt.sgd(0.0))


def test_a_step_is_pure_and_repeats() -> None:
    program, state = chain(reads_both, AID, fm.ITD(), steps=3)
    before = fingerprint(state)
    first, metrics = program.step(state, {})
    again, _ = program.step(state, {})
    assert fingerprint(state) == before
    assert bits(first.params) == bits(again.params)
    assert first.step == {"z": 12, "y": 3, "x": 1}
    assert not any(
        x.requires_grad for tree in (first.params, first.optimizer) for x in torch.utils._pytree.tree_leaves(tree)
    )
    assert set(metrics["x"]) == {"cost", "costs", "aux", "gradient_norm", "stats"}
    assert len(metrics["y"]["costs"]) == 3


def test_solving_again_draws_no_batches() -> None:
    # Each batch of an iterator is drawn once: solving again in a backward pass goes back to the last loop's.
    drawn = {"z": 0, "y": 0}

    def source(name):
        for t in itertools.count():
            drawn[name] += 1
            yield torch.tensor(1.0 + 0.01 * t).double()

    program = fm.Multilevel(
        fm.Level("z", lambda z, y, batch: ((z - y * batch) ** 2).sum(), torchopt.sgd(0.25), steps=2, response=AID),
        fm.Level(
            "y", lambda y, z, x, batch: ((y - x) ** 2).sum() + batch * (z**2).sum(), torchopt.sgd(0.1), steps=2, response=AID
        ),
        fm.Level("x", lambda x, y: (y**2).sum() + (x**2).sum(), torchopt.sgd(0.1)),
        composition="nested",
    )
    state = program.init({name: torch.ones(2).double() for name in "zyx"})
    by_iterator, _ = program.step(state, {"z": source("z"), "y": source("y")})
    assert drawn == {"z": 4, "y": 2}
    by_index, _ = program.step(state, dict.fromkeys("zy", lambda t: torch.tensor(1.0 + 0.01 * t).double()))
    assert bits(by_iterator.params) == bits(by_index.params)


def test_an_estimator_that_cannot_be_differentiated_again_is_refused_below_a_response() -> None:
    with pytest.raises(fm.DefinitionError, match=r"level 'z': FiniteDifference\(\) cannot be differentiated again .*'y'"):
        chain(reads_one, fm.FiniteDifference(), AID)
    # As the outermost response it is differentiated by no one. Its identity inverse is the inverse here.
    program = fm.Multilevel(
        fm.Level("z", lambda z, y: ((z - y) ** 2).sum() / 2, torchopt.sgd(1.0), response=AID),
        fm.Level(
            "y",
            lambda y, z, x: (y**2).sum() / 4 + (z**2).sum() / 4 - (y * x).sum(),
            torchopt.sgd(1.0),
            steps=2,
            response=fm.FiniteDifference(),
        ),
        fm.Level("x", lambda x, y: torch.sin(y).sum(), torchopt.sgd(0.1)),
        composition="nested",
    )
    x = torch.tensor([0.3, -1.0]).double()
    state = program.init({"z": torch.zeros(2).double(), "y": torch.zeros(2).double(), "x": x})
    assert torch.allclose(program.hypergradient(state, {}, of="x"), torch.cos(x), rtol=1e-7)  # T_y = ½y² − xy


def test_what_nested_does_not_carry_is_refused_by_name() -> None:
    with pytest.raises(fm.DefinitionError, match=r"roll_back=True is carried by composition=\"paths\" only"):
        chain(reads_one, AID, AID, roll_back=True)

    class Window(fm.BestResponse):
        requires = "trajectory"

        def vjp(self, solved, cotangent, state):
            raise NotImplementedError

    with pytest.raises(fm.DefinitionError, match=r"Window\(\) needs the inner run \(requires='trajectory'\)"):
        chain(reads_one, AID, Window())
    program, state = chain(reads_one, AID, AID)
    states = torch.utils._pytree.tree_map(lambda x: torch.stack([x, x]), state)
    with pytest.raises(fm.EstimatorError, match=r"cannot be mapped .*map over fm.argmin"):
        torch.vmap(lambda s: program.step(s, {})[0].params["x"])(states)
    program, state = chain(reads_one, AID, fm.ITD())
    with pytest.raises(fm.EstimatorError, match="ITD differentiates the inner steps, but none were made"):
        program.hypergradient(state, {}, of="x", solve=False)


def test_a_failed_solve_inside_is_an_error() -> None:
    # At y = 0 the middle level's total cost has a maximum: T_y = ½y² − z*², z* = y.
    program = fm.Multilevel(
        fm.Level("z", lambda z, y: ((z - y) ** 2).sum() / 2, torchopt.sgd(1.0), response=AID),
        fm.Level("y", lambda y, z, x: (y**2).sum() / 2 - (z**2).sum() + 0 * (x * y).sum(), torchopt.sgd(0.1), response=AID),
        fm.Level("x", lambda x, y: y.sum() + (x**2).sum(), torchopt.sgd(0.1)),
        composition="nested",
    )
    state = program.init({name: torch.zeros(2) for name in "zyx"})
    with pytest.raises(fm.EstimatorError, match=r"level 'y': the linear solve of AID.* met a direction of zero or negative"):
        program.step(state, {})


def test_the_trilevel_chain_where_paths_and_differences_disagree() -> None:
    # z* = y, T_y = ½(y − x)² + ½y² and y* = x/2, so dC_x/dx = ½(y* − 1); eq. 2 holds z still and answers y* − 1.
    levels = (
        fm.Level("z", lambda z, y: (z - y) ** 2 / 2, torchopt.sgd(1.0), response=AID),
        fm.Level("y", lambda y, x, z: (y - x) ** 2 / 2 + z**2 / 2, torchopt.sgd(0.5), steps=2, response=AID),
        fm.Level("x", lambda x, y: (y - 1) ** 2 / 2, torchopt.sgd(0.1)),
    )
    with pytest.warns(fm.FuncmloWarning, match="u2l edges y -> z"):
        paths = fm.Multilevel(*levels)
    nested = fm.Multilevel(*levels, composition="nested")
    state = paths.init({"z": torch.tensor(0.0).double(), "y": torch.tensor(0.0).double(), "x": torch.tensor(1.0).double()})
    reference, error = finite_difference(solved_again(nested, state, {}), state.params["x"])
    assert_agrees(reference, torch.tensor([-0.25]).double(), error)
    assert torch.allclose(nested.hypergradient(state, {}, of="x"), torch.tensor(-0.25).double(), rtol=1e-12)
    assert torch.allclose(paths.hypergradient(state, {}, of="x"), torch.tensor(-0.5).double(), rtol=1e-12)


@pytest.mark.parametrize("composition", ["paths", "nested"])
@pytest.mark.parametrize("response", [AID, fm.ITD(), fm.FiniteDifference()], ids=["aid", "itd", "finite difference"])
def test_a_min_max_pair_reaches_its_saddle(response: fm.BestResponse, composition: str) -> None:
    # f = ½‖x − a‖² + xᵀMy − ½‖y‖²: the saddle is x = (1 + MᵀM)⁻¹ a, y = Mᵀx. An identity inverse is the inverse here.
    m, a = vector_like((torch.zeros(3, 3).double(), torch.zeros(3).double()), 5)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return ((x - a) ** 2).sum() / 2 + x @ m @ y - (y**2).sum() / 2

    program = fm.Multilevel(
        fm.Level("y", lambda y, x: f(x, y), torchopt.sgd(0.5), steps=8, response=response, maximize=True),
        fm.Level("x", f, torchopt.sgd(0.1)),
        composition=composition,
    )
    state = program.init({"x": torch.zeros(3).double(), "y": torch.zeros(3).double()})
    for _ in range(300):
        state, metrics = program.step(state, {})
    saddle = torch.linalg.solve(torch.eye(3).double() + m @ m.T, a)
    assert torch.allclose(state.params["x"], saddle, atol=1e-8)
    assert torch.allclose(state.params["y"], m.T @ saddle, atol=1e-6)
    assert torch.allclose(metrics["y"]["cost"], metrics["x"]["cost"], atol=1e-6)


def test_min_max_min() -> None:
    # x minimizes what y maximizes over what z minimizes: signs and curvatures follow through the nesting.
    def f(x, y, z):
        return (
            ((x - 1) ** 2).sum()
            + (x * y).sum()
            - (y**2).sum()
            + (y * z).sum() / 2
            + (z**2).sum()
            + 0.1 * torch.sin(x * z).sum()
        )

    program = fm.Multilevel(
        fm.Level("z", lambda z, y, x: f(x, y, z), torchopt.sgd(0.45), steps=16, response=AID),
        fm.Level("y", lambda y, z, x: f(x, y, z), torchopt.sgd(0.4), steps=20, response=AID, maximize=True),
        fm.Level("x", lambda x, y, z: f(x, y, z), torchopt.sgd(0.1)),
        composition="nested",
    )
    state = program.init({name: vector_like(torch.zeros(2).double(), i) for i, name in enumerate("zyx")})
    reference, error = finite_difference(solved_again(program, state, {}), state.params["x"], step=1e-2)
    assert_agrees(program.hypergradient(state, {}, of="x"), reference, error, relative=1e-8)


def test_an_outside_solver_at_the_lowest_level() -> None:
    closed, _ = chain(reads_both, AID, AID)
    levels = list(closed.levels)
    levels[0] = fm.Level(
        "z",
        lambda z, y, x: ((z - torch.sin(y)) ** 2).sum() / 2 - (z * x).sum(),
        fm.Solver(lambda z, y, x: torch.sin(y) + x),
        response=AID,
    )
    program = fm.Multilevel(*levels, composition="nested")
    state = program.init({name: vector_like(torch.zeros(3).double(), i) for i, name in enumerate("zyx")})
    reference, error = finite_difference(solved_again(program, state, {}), state.params["x"], step=1e-2)
    assert_agrees(program.hypergradient(state, {}, of="x"), reference, error, relative=1e-8)


def test_away_from_the_solution_it_is_solved_again() -> None:
    # z* = y + x and T_y = ¼y² + ¼z*² has Hessian 1 and ∇²_xy T = ½. The central difference of ∇_x T_y along v sees x
    # through z* alone, so it is zero unless z is solved again at y ± εv.
    program = fm.Multilevel(
        fm.Level("z", lambda z, y, x: ((z - y - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=AID),
        fm.Level("y", lambda y, z: (y**2).sum() / 4 + (z**2).sum() / 4, torchopt.sgd(1.0), response=fm.FiniteDifference()),
        fm.Level("x", lambda x, y: torch.sin(y).sum(), torchopt.sgd(0.1)),
        composition="nested",
    )
    x = torch.tensor([0.3, -1.0]).double()
    state = program.init({"z": torch.zeros(2).double(), "y": torch.zeros(2).double(), "x": x})
    assert torch.allclose(program.hypergradient(state, {}, of="x"), -torch.cos(-x / 2) / 2, rtol=1e-7)


def test_without_solving_the_states_parameters_are_the_solutions() -> None:
    # T_y = ½(y − x)² + ¼z⁴ with z* = y, at z = 2 although y = 0: the Hessian is 1 + 3z² = 13, and dy*/dx = 1/13.
    program = fm.Multilevel(
        fm.Level("z", lambda z, y: (z - y) ** 2 / 2, torchopt.sgd(1.0), response=AID),
        fm.Level("y", lambda y, x, z: (y - x) ** 2 / 2 + z**4 / 4, torchopt.sgd(0.1), response=AID),
        fm.Level("x", lambda x, y: 13 * y, torchopt.sgd(0.1)),
        composition="nested",
    )
    state = program.init({"z": torch.tensor(2.0).double(), "y": torch.tensor(0.0).double(), "x": torch.tensor(1.0).double()})
    assert torch.allclose(program.hypergradient(state, {}, of="x", solve=False), torch.ones(()).double(), rtol=1e-12)


def test_itd_follows_where_loops_begin_also_of_levels_that_are_not_read() -> None:
    # a runs before b's updates too, because it reads b; what it does there moves where its next loop begins.
    def program(steps: int) -> fm.Multilevel:
        rate = torchopt.sgd(0.3)
        return fm.Multilevel(
            fm.Level("a", lambda a, b, c: ((a - torch.sin(b) * c) ** 2).sum() / 2, rate, steps=steps, response=fm.ITD()),
            fm.Level("b", lambda b, c: ((b - c) ** 2).sum() / 2, rate, steps=steps, response=fm.ITD()),
            fm.Level("c", lambda c, a: (a**2).sum() + c.sum(), torchopt.sgd(0.1)),
            composition="nested",
        )

    for steps in (1, 2, 5):
        p = program(steps)
        state = p.init({name: vector_like(torch.zeros(2).double(), i) for i, name in enumerate("abc")})
        reference, error = finite_difference(solved_again(p, state, {}, "c"), state.params["c"], step=1e-2)
        assert_agrees(p.hypergradient(state, {}, of="c"), reference, error)


@given(h=hierarchies(most=4), numbers=st.lists(st.integers(1, 2), min_size=4, max_size=4))
def test_random_hierarchies_of_itd_are_the_derivative_of_what_ran(h: Hierarchy, numbers: list[int]) -> None:
    levels = [
        fm.Level(x.name, x.loss, torchopt.sgd(0.3), reads=x.reads, steps=n, response=fm.ITD())
        for x, n in zip(h.levels(), numbers, strict=False)
    ]
    top = h.names[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)
        p = fm.Multilevel(
            *levels[:-1], fm.Level(top, levels[-1].loss, torchopt.sgd(0.3), reads=levels[-1].reads), composition="nested"
        )
    state = p.init(h.start(3))
    if len(p.schedule().tops) > 1:
        return  # another top level's updates come in between, and are not the top's to answer for
    reference, error = finite_difference(solved_again(p, state, {}, top), state.params[top], step=1e-2)
    assert_agrees(p.hypergradient(state, {}, of=top), reference, error, relative=1e-8, size=1.0)
