"""What `step` does, held against loops written by hand; purity; batches; randomness."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial, wraps

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
import torchopt
from torch.utils.data import DataLoader, TensorDataset

import funcmlo as fm
from tests.oracles import bits, fingerprint
from tests.programs import BATCHES, SGD, Spy, lower, program, start, upper
from tests.registry import ESTIMATORS, OPTIMIZERS


def test_step_is_the_loop_one_would_write() -> None:
    # Two outer steps by hand with torch.optim: warm-started lower level, momentum kept, its last batch in the response.
    p = program(optimizer=torchopt.sgd(0.1, momentum=0.9))
    state = p.init(start())
    y, x = (start()[k].clone().requires_grad_() for k in "yx")
    inner, outer = torch.optim.SGD([y], 0.1, momentum=0.9), torch.optim.Adam([x], 0.1)
    stream = iter(BATCHES)
    for k in range(2):
        state, metrics = p.step(state, {"y": stream})
        for t in range(3):
            inner.zero_grad()
            cost = lower(y, x.detach(), BATCHES[3 * k + t])[0]
            cost.backward()
            inner.step()
        # H = I and ∇²_xy g = −I, so the hypergradient is ∂f/∂x + ∂f/∂y.
        x.grad = 0.2 * x.detach() + torch.cos(y.detach())
        outer.step()
        assert torch.allclose(metrics["y"]["cost"], cost.detach())
    assert torch.allclose(state.params["y"], y.detach(), rtol=1e-14)
    assert torch.allclose(state.params["x"], x.detach(), rtol=1e-12)
    assert state.step == {"y": 6, "x": 2}
    assert metrics["y"]["costs"].shape == (3,)
    assert torch.equal(metrics["y"]["aux"]["batch"], BATCHES[5].sum())
    assert metrics["x"]["stats"]["y"].hvps == 1
    assert torch.allclose(metrics["x"]["gradient_norm"], x.grad.norm(), rtol=1e-12)


def test_fixed_batches_indexed_sources_and_iterators() -> None:
    p, state = program(fm.ITD()), program().init(start())
    by_index, _ = p.step(state, {"y": BATCHES.__getitem__})
    by_iterator, _ = p.step(state, {"y": iter(BATCHES)})
    assert bits(by_index) == bits(by_iterator)
    fixed, _ = p.step(state, {"y": BATCHES[0]})
    repeated, _ = p.step(state, {"y": itertools.repeat(BATCHES[0])})
    assert bits(fixed) == bits(repeated)
    assert bits(fixed) != bits(by_index)
    # An indexed source counts the level's own steps on, from call to call.
    asked = []
    p.step(by_index, {"y": lambda t: asked.append(t) or BATCHES[t]})
    assert asked == [3, 4, 5]


@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.CG(5)), fm.FiniteDifference()], ids=repr)
def test_an_indexed_source_is_asked_once_for_each_step(response: fm.BestResponse) -> None:
    # So that a source that draws at random still gives one batch per step, perturbed evaluations included.
    asked = []
    p = program(response)
    p.hypergradient(p.init(start()), {"y": lambda t: asked.append(t) or BATCHES[t]}, of="x")
    assert asked == [0, 1, 2]


def test_an_iterator_gives_one_batch_per_update_and_no_more() -> None:
    for response in (fm.ITD(), fm.AID(fm.CG(5)), fm.FiniteDifference()):
        stream = iter(BATCHES)
        program(response).step(program().init(start()), {"y": stream})
        assert next(stream) is BATCHES[3]


def test_a_loader_works_as_an_iterator() -> None:
    loader = DataLoader(TensorDataset(torch.stack(BATCHES)), batch_size=None)
    state = program().init(start())
    stream = (x for (x,) in loader)
    by_loader, _ = program().step(state, {"y": stream})
    by_list, _ = program().step(state, {"y": iter(BATCHES)})
    assert bits(by_loader) == bits(by_list)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "clipped", "scheduled"])
def test_nothing_that_comes_in_is_changed_and_twice_is_the_same(name: str, optimizer: str) -> None:
    estimator = ESTIMATORS[name](1.0, 4)
    p = program(estimator, OPTIMIZERS[optimizer]())
    params = start()

    def around(t: int) -> torch.Tensor:
        return BATCHES[t % len(BATCHES)]

    state, _ = p.step(p.init(params), {"y": BATCHES[0]})
    before = fingerprint((params, state, BATCHES))
    torch.manual_seed(5)
    first, metrics = p.step(state, {"y": around})
    torch.manual_seed(6)
    second, again = p.step(state, {"y": around})
    one, two = (p.hypergradient(state, {"y": around}, of="x") for _ in range(2))
    assert fingerprint((params, state, BATCHES)) == before
    assert bits(first) == bits(second)
    assert bits(metrics["y"]["costs"]) == bits(again["y"]["costs"])
    assert bits(one) == bits(two)
    assert not any(x.requires_grad for x in optree.tree_leaves(first) if isinstance(x, torch.Tensor))


def test_the_hypergradient_is_what_step_gives_the_optimizer() -> None:
    seen = []

    def update(g, s, *, params=None, inplace=True):
        seen.append(g)
        return -0.1 * g, s

    spy = torchopt.base.GradientTransformation(lambda params: (), update)
    for response in (fm.ITD(), fm.AID(fm.CG(5)), fm.FiniteDifference()):
        p = fm.Multilevel(fm.Level("y", lower, torchopt.sgd(0.1), steps=3, response=response), fm.Level("x", upper, spy))
        state = p.init(start())
        answer = p.hypergradient(state, {"y": BATCHES.__getitem__}, of="x")
        p.step(state, {"y": BATCHES.__getitem__})
        assert bits(answer) == bits(seen[-1])


def test_the_lowest_level_has_its_own_gradient() -> None:
    p, params = program(), start()
    answer = p.hypergradient(p.init(params), {"y": BATCHES[0]}, of="y")
    assert torch.allclose(answer, params["y"] - params["x"] + BATCHES[0], rtol=1e-14)


def test_only_the_batches_of_levels_that_run_are_needed() -> None:
    p = fm.Multilevel(
        fm.Level("y", lower, torchopt.sgd(0.1), response=fm.ITD()),
        fm.Level("x", lambda x, y, batch: ((x - y) * batch).sum(), torchopt.sgd(0.1)),
    )
    state = p.init(start())
    answer = p.hypergradient(state, {"y": BATCHES[0]}, of="y")
    assert bits(answer) == bits(p.hypergradient(state, {"y": BATCHES[0], "x": iter([])}, of="y"))


def test_a_replay_that_was_not_announced_is_refused() -> None:
    class Replaying(fm.BestResponse):
        def vjp(self, solved, cotangent, state):
            solved.update(*solved.start(solved.inputs), solved.inputs, 0)

    p = program(Replaying())
    with pytest.raises(fm.BatchError, match=r'step 0 of level .y. came from an iterator and is gone.*requires = "replay"'):
        p.step(p.init(start()), {"y": iter(BATCHES)})


def test_without_solving_the_state_is_the_solution() -> None:
    p, params = program(), start()
    state = p.init(params)
    answer, stats = p.hypergradient(state, {"y": BATCHES[0]}, of="x", solve=False, with_stats=True)
    assert torch.allclose(answer, torch.cos(params["y"]) + 0.2 * params["x"], rtol=1e-12)
    assert stats["y"].hvps == 1
    # The batch that is bound is the last inner step's.
    asked = []
    stepped, _ = p.step(state, {"y": BATCHES.__getitem__})
    p.hypergradient(stepped, {"y": lambda t: asked.append(t) or BATCHES[t]}, of="x", solve=False)
    assert set(asked) == {2}


def test_init_restarts_each_inner_loop_and_its_optimizer() -> None:
    p = fm.Multilevel(
        fm.Level(
            "y", lower, torchopt.sgd(0.1, momentum=0.9), steps=2, response=fm.ITD(), init=lambda x: torch.zeros_like(x)
        ),
        fm.Level("x", lambda x, y: (x * y).sum(), torchopt.sgd(0.0)),
    )
    state = p.init({"x": start()["x"]})
    assert torch.equal(state.params["y"], torch.zeros(4).double())
    first, _ = p.step(state, {"y": BATCHES[0]})
    second, _ = p.step(first, {"y": BATCHES[0]})
    assert bits(first.params) == bits(second.params)
    assert bits(first.optimizer["y"]) == bits(second.optimizer["y"])
    assert second.step["y"] == 4


def test_projection_keeps_both_levels_in_their_sets() -> None:
    def clamp(v):
        return v.clamp(0.0, 0.5)

    p = fm.Multilevel(
        fm.Level("y", lower, torchopt.sgd(0.5), steps=3, response=fm.ITD(), project=clamp),
        fm.Level("x", upper, torchopt.sgd(5.0), project=lambda v: v / v.norm()),
    )
    state, _ = p.step(p.init(start()), {"y": BATCHES[0]})
    assert float(state.params["y"].min()) >= 0.0
    assert float(state.params["y"].max()) <= 0.5
    assert torch.allclose(state.params["x"].norm(), torch.tensor(1.0).double())


def test_maximize_is_the_negative_cost() -> None:
    up = fm.Multilevel(
        fm.Level("y", lambda y, x: -((y - x) ** 2).sum(), torchopt.sgd(0.1), response=fm.AID(fm.CG(5)), maximize=True),
        fm.Level("x", lambda x, y: -upper(x, y), torchopt.sgd(0.1), maximize=True),
    )
    down = fm.Multilevel(
        fm.Level("y", lambda y, x: ((y - x) ** 2).sum(), torchopt.sgd(0.1), response=fm.AID(fm.CG(5))),
        fm.Level("x", upper, torchopt.sgd(0.1)),
    )
    (a, rising), (b, falling) = (p.step(p.init(start()), {}) for p in (up, down))
    assert bits(a.params) == bits(b.params)
    assert torch.equal(rising["x"]["cost"], -falling["x"]["cost"])
    assert torch.equal(rising["y"]["cost"], -falling["y"]["cost"])


@pytest.mark.parametrize("composition", ["paths", "nested"])
def test_a_single_level_is_plain_training(composition: str) -> None:
    level = fm.Level("w", lambda w, batch: ((w - batch) ** 2).sum(), torchopt.sgd(0.25))
    p = fm.Multilevel(level, composition=composition)
    state, metrics = p.step(p.init({"w": torch.tensor([2.0])}), {"w": torch.tensor([1.0])})
    assert torch.equal(state.params["w"], torch.tensor([1.5]))
    assert metrics["w"]["stats"] == {}


def test_signatures_say_what_is_read() -> None:
    def decorated(function):
        @wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    class Costs:
        def method(self, y, x, *, batch, scale=2.0):
            return scale * ((y - x - batch) ** 2).sum()

    def shared(own, other, batch, scale):
        return scale * ((own - other - batch) ** 2).sum()

    def anything(*args, **kwargs):
        return shared(*args, scale=2.0)

    costs = {
        "bound method, keyword-only, default": (Costs().method, None),
        "decorator": (decorated(Costs().method), None),
        "partial by keyword": (partial(lambda y, x, batch, scale: shared(y, x, batch, scale), scale=2.0), None),
        "partial by position": (partial(lambda scale, y, x, batch: shared(y, x, batch, scale), 2.0), None),
        "shared with reads": (partial(shared, scale=2.0), {"other": "x"}),
        "*args with reads": (anything, {"a": "x", "b": "batch"}),
        "**kwargs with reads": (lambda y, **named: shared(y, named["p"], named["q"], 2.0), {"p": "x", "q": "batch"}),
        "a default that reads= overrides": (lambda y, batch, scale=2.0, x=None: shared(y, x, batch, scale), {"x": "x"}),
    }
    answers = {}
    for name, (cost, reads) in costs.items():
        p = fm.Multilevel(
            fm.Level("y", cost, torchopt.sgd(0.1), response=fm.AID(fm.CG(5)), reads=reads),
            fm.Level("x", upper, torchopt.sgd(0.1)),
        )
        assert p.graph.u2l == (("x", "y"),), name
        assert p.graph.l2u == (("y", "x"),), name
        answers[name] = bits(p.step(p.init(start()), {"y": BATCHES[0]})[0].params)
    assert len({tuple(answer) for answer in answers.values()}) == 1


def test_the_graph_of_two_levels() -> None:
    graph = program().graph
    assert graph.levels == ("y", "x")
    assert graph.paths("x") == (("x", "y"),)
    assert graph.paths("y") == ()
    assert [line for line in str(graph).splitlines() if "<-" in line] == ["x <- y (l2u)", "y <- x (u2l)"]
    # Edges come from init and from the optimizer too.
    p = fm.Multilevel(
        fm.Level("y", lambda y: (y**2).sum(), lambda x: torchopt.sgd(x["lr"]), init=lambda x: x["start"], response=fm.ITD()),
        fm.Level("x", lambda x, y: y.sum(), torchopt.sgd(0.1)),
    )
    assert p.graph.u2l == (("x", "y"),)


def test_the_state_is_a_pytree_of_both_libraries() -> None:
    state = program().init(start(), seed=3)
    for flatten, unflatten in (
        (optree.tree_flatten, lambda leaves, spec: optree.tree_unflatten(spec, leaves)),
        (torch_pytree.tree_flatten, torch_pytree.tree_unflatten),
    ):
        leaves, spec = flatten(state)
        back = unflatten(leaves, spec)
        assert isinstance(back, fm.State)
        assert bits(back.params) == bits(state.params)
        assert (back.step, back.seed) == ({"y": 0, "x": 0}, 3)
    assert repr(state) == "State(y: 4 at step 0, x: 4 at step 0; seed=3)"


def test_what_init_is_given_is_copied() -> None:
    params = start()
    state = program().init(params)
    params["y"].add_(1.0)
    assert torch.equal(state.params["y"], start()["y"])


def test_a_program_is_mapped_over_states() -> None:
    p = program(fm.AID(fm.CG(5)))
    states = [p.init(start(seed)) for seed in (0, 2, 4)]
    stacked = torch_pytree.tree_map(lambda *xs: torch.stack(xs), *states)
    many = torch.func.vmap(lambda s: p.step(s, {"y": BATCHES[0]})[0])(stacked)
    for i, state in enumerate(states):
        one, _ = p.step(state, {"y": BATCHES[0]})
        for level in "yx":
            assert torch.allclose(many.params[level][i], one.params[level], rtol=1e-12)


def test_estimator_state_is_carried() -> None:
    class Counting(fm.BestResponse):
        def init(self, params):
            return torch.zeros(())

        def vjp(self, solved, cotangent, state):
            return {name: torch.zeros_like(x) for name, x in solved.inputs.items()}, state + 1, {"calls": int(state) + 1}

    p = program(Counting())
    state = p.init(start())
    for _ in range(2):
        state, metrics = p.step(state, {"y": BATCHES[0]})
    assert float(state.response["y"]) == 2.0
    assert metrics["x"]["stats"]["y"] == {"calls": 2}
    p.hypergradient(state, {"y": BATCHES[0]}, of="x")
    assert float(state.response["y"]) == 2.0


def test_what_an_estimator_sees() -> None:
    spy = Spy()
    p = program(spy, OPTIMIZERS["momentum"]())
    params = start()
    state = p.init(params)
    after, _ = p.step(state, {"y": iter(BATCHES)})
    (solved,) = spy.seen
    assert bits(solved.params) == bits(after.params["y"])
    assert bits(solved.opt_state) == bits(after.optimizer["y"])
    assert bits(solved.init[0]) == bits(params["y"])
    assert solved.steps == 3
    assert solved.trajectory is None
    # The loss is the last inner step's; draws go on from there; a replay of the updates gives the solution to the bit.
    x = solved.inputs
    assert torch.equal(solved.loss(solved.params, x), lower(solved.params, params["x"], BATCHES[2])[0])
    assert torch.equal(solved.loss(solved.params, x, draw=1), lower(solved.params, params["x"], BATCHES[4])[0])
    y, s = solved.start(x)
    for t in range(solved.steps):
        y, s = solved.update(y, s, x, t)
    assert bits((y, s)) == bits((solved.params, solved.opt_state))


def test_a_trajectory_holds_its_states() -> None:
    seen = []

    class Spy(fm.ITD):
        def vjp(self, solved, cotangent, state):
            seen.append(solved)
            return super().vjp(solved, cotangent, state)

    p = program(Spy())
    after, _ = p.step(p.init(start()), {"y": BATCHES[0]})
    states = seen[0].trajectory.states
    assert len(states) == 4
    assert bits(states[0][0]) == bits(start()["y"])
    assert bits(states[-1][0]) == bits(after.params["y"])


def test_starts_and_projections_that_draw_repeat() -> None:
    p = fm.Multilevel(
        fm.Level(
            "y",
            lambda y, x: ((y - x) ** 2).sum(),
            torchopt.sgd(0.1),
            steps=2,
            response=fm.ITD(),
            init=lambda: torch.rand(4, dtype=torch.float64),
            project=lambda y: y + 0.1 * torch.randn(4, dtype=torch.float64),
        ),
        fm.Level("x", upper, torchopt.sgd(0.1)),
    )
    torch.manual_seed(0)
    state = p.init({"x": start()["x"]}, seed=1)
    first, second = (p.step(state, {})[0] for _ in range(2))
    assert bits(first.params) == bits(second.params)
    assert bits(p.init({"x": start()["x"]}, seed=1).params) == bits(state.params)
    assert bits(p.init({"x": start()["x"]}, seed=2).params) != bits(state.params)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)


def test_seeds_make_the_randomness() -> None:
    def noisy(y, x):
        return (torch.rand(4, dtype=torch.float64) * (y - x) ** 2).sum()

    p = fm.Multilevel(
        fm.Level("y", noisy, torchopt.sgd(0.1), steps=2, response=fm.ITD()), fm.Level("x", upper, torchopt.sgd(0.1))
    )
    state = p.init(start(), seed=1)
    first, _ = p.step(state, {})
    assert bits(p.step(replace(state, seed=2), {})[0].params) != bits(first.params)


def test_the_state_is_cut_from_the_graph_of_what_init_is_given() -> None:
    params = {name: tree.requires_grad_() for name, tree in start().items()}
    state = program().init(params)
    assert not any(tree.requires_grad for tree in state.params.values())


def test_a_hypergradient_that_is_not_finite_is_refused() -> None:
    p = fm.Multilevel(
        fm.Level("y", lambda y, x: ((y - x) ** 2).sum(), SGD, response=fm.AID(fm.CG(3))),
        fm.Level("x", lambda x, y: (y / 0.0).abs().sum(), SGD),
    )
    with pytest.raises(fm.NonFiniteError, match=r"level 'x': its cost is inf"):
        p.hypergradient(p.init(start()), {}, of="x")


def test_metrics_are_what_they_say() -> None:
    p = fm.Multilevel(
        fm.Level("y", lambda y, x: 1 - ((y - x) ** 2).sum(), SGD, steps=3, response=fm.AID(fm.CG(5)), maximize=True),
        fm.Level("x", upper, SGD),
    )
    state = p.init(start())
    gradient, stats = p.hypergradient(state, {}, of="x", with_stats=True)
    _, metrics = p.step(state, {})
    # y moves by 0.2 (x − y) at each step, so the cost before step t is 1 − 0.64^t ‖y₀ − x‖².
    distance = ((start()["y"] - start()["x"]) ** 2).sum()
    costs = torch.stack([1 - 0.64**t * distance for t in range(3)])
    assert torch.allclose(metrics["y"]["costs"], costs, rtol=1e-12)
    assert torch.equal(metrics["y"]["cost"], metrics["y"]["costs"][-1])
    assert torch.allclose(metrics["x"]["gradient_norm"], gradient.norm(), rtol=1e-14)
    for answer in (stats["y"], metrics["x"]["stats"]["y"]):
        assert type(answer.iterations) is int
        assert type(answer.residual) is float
        assert answer.converged is True
        assert answer.negative_curvature is False


def test_a_program_without_inner_steps_moves_the_upper_level_alone() -> None:
    p, params = program(steps=0), start()
    state, metrics = p.step(p.init(params), {"y": BATCHES[0]})
    assert set(metrics) == {"x"}
    assert bits(state.params["y"]) == bits(params["y"])
    assert state.step == {"y": 0, "x": 1}


def test_the_gradient_of_a_level_that_starts_afresh_is_that_at_its_start() -> None:
    p, params = program(init=lambda x: 2 * x), start()
    state = p.init(params)
    at_start = p.hypergradient(state, {"y": BATCHES[0]}, of="y")
    assert torch.allclose(at_start, params["x"] + BATCHES[0], rtol=1e-12)
    where_it_is = p.hypergradient(state, {"y": BATCHES[0]}, of="y", solve=False)
    assert torch.allclose(where_it_is, params["y"] - params["x"] + BATCHES[0], rtol=1e-12)


def test_what_a_start_returns_is_copied_and_checked_like_any_parameters() -> None:
    p = program(init=lambda x: x)
    state = p.init({"x": start()["x"]})
    assert state.params["y"].data_ptr() != state.params["x"].data_ptr()
    with pytest.raises(fm.ParameterError, match=r"level 'y': parameter has dtype torch.int64"):
        program(init=lambda x: torch.zeros(4, dtype=torch.int64)).init({"x": start()["x"]})


def test_the_upper_losss_metrics_come_out() -> None:
    p = fm.Multilevel(
        fm.Level("y", lower, SGD, response=fm.AID(fm.CG(5))),
        fm.Level("x", lambda x, y: (upper(x, y), {"size": (x**2).sum()}), SGD),
    )
    _, metrics = p.step(p.init(start()), {"y": BATCHES[0]})
    assert torch.equal(metrics["x"]["aux"]["size"], (start()["x"] ** 2).sum())
    assert not metrics["x"]["aux"]["size"].requires_grad
