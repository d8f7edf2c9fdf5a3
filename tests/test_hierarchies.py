"""Hierarchies of any shape: eq. 2 path by path, the total derivative, and where the two are the same."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st

import funcmlo as fm
from tests.hierarchies import CHAIN, NAMED, ROUND_FROM_BELOW, Hierarchy, hierarchies
from tests.registry import COMPUTED, ESTIMATORS, RELATIVE

# The costs are quadratics with numbers of order one, in float64: what is left are a few dozen roundings.
ROUNDING = 1e-12


@pytest.fixture(autouse=True)
def _expected_doubts():
    """Random programs have levels without paths, and paths that are not exact; both are warned of: tested below."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no path leads|.*no level reads it", fm.FuncmloWarning)
        warnings.filterwarnings("ignore", 'composition="paths" is not the total derivative', fm.FuncmloWarning)
        yield


def solved_values(h: Hierarchy, k: str) -> dict[str, torch.Tensor]:
    """Random parameters, the levels below k at the solutions of their total costs."""
    values = h.start(h.seed + 1)
    return {**values, **h.solve_below(k, values)}


def close(a: torch.Tensor, b: torch.Tensor, relative: float = ROUNDING) -> bool:
    assert a.shape == b.shape
    return bool(torch.linalg.vector_norm(a - b) <= relative * (1 + torch.linalg.vector_norm(b)))


@given(h=hierarchies())
def test_paths_are_eq_2_summed_path_by_path(h: Hierarchy) -> None:
    program = h.program("paths")
    values = h.start(h.seed + 1)  # eq. 2 is a formula at a point, whatever the point
    state = program.init(values)
    for k in h.names:
        answer, stats = program.hypergradient(state, {}, of=k, solve=False, with_stats=True)
        assert close(answer, h.path_sum(program.graph, k, values))
        assert set(stats) == {name for path in program.graph.paths(k) for name in path[1:]}
        assert all(s.products == 1 for s in stats.values())


@given(h=hierarchies())
def test_nested_is_the_total_derivative(h: Hierarchy) -> None:
    program = h.program("nested")
    for k in h.names:
        values = solved_values(h, k)
        answer = program.hypergradient(program.init(values), {}, of=k, solve=False)
        assert close(answer, h.total_gradient(k, values))


@pytest.mark.parametrize("reads", NAMED.values(), ids=NAMED)
def test_named_hierarchies(reads: dict[str, tuple[str, ...]]) -> None:
    h = Hierarchy(reads, seed=3, size=3)
    paths, nested = h.program("paths"), h.program("nested")
    for k in h.names:
        values = solved_values(h, k)
        state = paths.init(values)  # a state serves both compositions
        by_paths, total = (p.hypergradient(state, {}, of=k, solve=False) for p in (paths, nested))
        assert close(by_paths, h.path_sum(paths.graph, k, values))
        assert close(total, h.total_gradient(k, values))


def test_exact_is_right_in_both_directions() -> None:
    source, answers = random.Random(0), []
    for seed in range(170):
        names = [f"p{i}" for i in range(source.randint(2, 5))]
        density = source.choice([0.3, 0.5, 0.8])
        reads = {name: tuple(x for x in names if x != name and source.random() < density) for name in names}
        answers += exactness_and_gap(Hierarchy(reads, seed, size=1))
    answers += [pair for reads in NAMED.values() for pair in exactness_and_gap(Hierarchy(reads, seed=1, size=1))]
    assert len(answers) >= 400
    assert min(sum(exact for exact, _ in answers), sum(not exact for exact, _ in answers)) >= 80
    for exact, gap in answers:
        # Where they differ, they differ by a product of couplings of order 0.1, not by roundings.
        assert (gap <= ROUNDING) if exact else (gap > 1e3 * ROUNDING)


def exactness_and_gap(h: Hierarchy) -> list[tuple[bool, float]]:
    paths, nested = h.program("paths"), h.program("nested")
    found = []
    for k in h.names[1:]:
        state = paths.init(solved_values(h, k))
        a, b = (p.hypergradient(state, {}, of=k, solve=False) for p in (paths, nested))
        found.append((bool(paths.graph.exact(k)), float(torch.linalg.vector_norm(a - b))))
    return found


@pytest.mark.parametrize("shape", NAMED)
@pytest.mark.parametrize("name", COMPUTED)
def test_every_estimator_at_every_node(name: str, shape: str) -> None:
    # The local Hessians are the identity, so one step of rate one solves each level, ITD's derivative of it is −B, and
    # an identity inverse is the inverse: all estimators' targets are eq. 2's own Jacobians.
    h = Hierarchy(NAMED[shape], seed=5)
    estimator = ESTIMATORS[name](1.0, h.size)
    top = h.names[-1]
    for node in h.names[:-1]:
        levels = [
            fm.Level(
                level.name,
                level.loss,
                torchopt.sgd(1.0),
                reads=level.reads,
                steps=2,
                response=estimator if level.name == node else fm.AID(fm.Direct()),
            )
            if level.name != top
            else level
            for level in h.levels()
        ]
        program = fm.Multilevel(*levels)
        state = program.init(h.start(9))
        answer = program.hypergradient(state, {}, of=top)
        after, metrics = program.step(state, {})
        values = {**after.params, top: state.params[top]}
        relative = max(RELATIVE[name], 1e-11)
        assert close(answer, h.path_sum(program.graph, top, values), relative)
        assert close(metrics[top]["gradient_norm"], torch.linalg.vector_norm(answer))


def test_other_estimators_for_other_upper_levels() -> None:
    # c and d both differentiate through a and b; a answers c by one estimator and d by another.
    class Marked(fm.BestResponse):
        def __init__(self, factor: float) -> None:
            object.__setattr__(self, "factor", factor)

        def init(self, params):
            return torch.zeros(())

        def vjp(self, solved, cotangent, state):
            products = {name: self.factor * torch.ones_like(x) for name, x in solved.inputs.items()}
            return products, state + self.factor, fm.Stats()

    sgd = torchopt.sgd(0.0)
    program = fm.Multilevel(
        fm.Level("a", lambda a, c, d: ((a - c - d) ** 2).sum(), sgd, response={"c": Marked(2.0), "d": Marked(3.0)}),
        fm.Level("c", lambda c, a: a.sum(), sgd),
        fm.Level("d", lambda d, a: a.sum(), sgd),
    )
    state = program.init({name: torch.zeros(2) for name in "acd"})
    assert set(state.response["a"]) == {"c", "d"}
    assert torch.equal(program.hypergradient(state, {}, of="c"), torch.full((2,), 2.0))
    assert torch.equal(program.hypergradient(state, {}, of="d"), torch.full((2,), 3.0))
    state, _ = program.step(state, {})
    state, _ = program.step(state, {})
    assert {k: float(x) for k, x in state.response["a"].items()} == {"c": 4.0, "d": 6.0}


def test_a_ladder_takes_one_product_a_level() -> None:
    rungs = 10  # 2^10 paths
    reads: dict[str, tuple[str, ...]] = {"a0": ("top",), "b0": ("top",)}
    for i in range(1, rungs):
        reads |= {f"{side}{i}": (f"a{i - 1}", f"b{i - 1}") for side in "ab"}
    reads["top"] = (f"a{rungs - 1}", f"b{rungs - 1}")
    h = Hierarchy(reads, seed=0, size=1)
    program = h.program("paths", response=fm.AID(fm.CG(3, tol=1e-14)))
    assert len(program.graph.paths("top")) == 2**rungs
    state = program.init(h.start(1))
    for solve in (False, True):
        answer, stats = program.hypergradient(state, {}, of="top", solve=solve, with_stats=True)
        assert len(stats) == 2 * rungs
        assert all(s.products == 1 for s in stats.values())
        if not solve:
            assert close(answer, h.path_sum(program.graph, "top", state.params))
    assert len(list(program.schedule())) == 2 * rungs + 1


def test_a_program_on_paths_says_once_where_they_are_not_the_total_derivative() -> None:
    with pytest.warns(
        fm.FuncmloWarning, match=r"'p3' what goes through the u2l edges p2 -> p1\. Use composition=\"nested\""
    ) as seen:
        program = Hierarchy(CHAIN, seed=0).program("paths")
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program.step(program.init(Hierarchy(CHAIN, seed=0).start(0)), {})
        Hierarchy(CHAIN, seed=0).program("nested")
    exact = program.graph.exact("p3")
    assert not exact
    assert list(exact) == [("p2", "p1")]
    assert program.graph.exact("p2")
    assert str(program.graph.exact("p2")) == "the products along paths are the total derivative of level 'p2'"


def test_what_paths_leave_out_where_no_path_leads_at_all() -> None:
    # 3 moves 2, which moves 1, which moves 0, which 3 reads: u2l edges all the way, so eq. 2 has no path.
    h = Hierarchy(ROUND_FROM_BELOW, seed=2)
    values = solved_values(h, "p3")
    paths, nested = h.program("paths"), h.program("nested")
    assert paths.graph.paths("p3") == ()
    assert set(paths.graph.exact("p3").edges) == {("p1", "p0")}
    direct = values["p3"] + h.numbers["p3", "p3"][2] + h.numbers["p3", "p0"][0] @ values["p0"]
    assert close(paths.hypergradient(paths.init(values), {}, of="p3", solve=False), direct)
    total = nested.hypergradient(nested.init(values), {}, of="p3", solve=False)
    assert torch.linalg.vector_norm(total - direct) > 1e-3


@given(h=hierarchies(most=4), seed=st.integers(0, 2**20))
def test_a_shape_of_graph_never_breaks_a_step(h: Hierarchy, seed: int) -> None:
    for composition in ("paths", "nested"):
        program = h.program(composition)
        state = program.init(h.start(seed))
        after, metrics = program.step(state, {})
        assert set(metrics) == set(h.names)
        made = list(program.schedule())
        assert {name: made.count(name) for name in h.names} == after.step
        for k in h.names:  # what step gives the optimizer first, when every level stands where step begins
            program.hypergradient(state, {}, of=k)


def test_three_levels_are_mapped_over_states() -> None:
    program = Hierarchy(CHAIN, seed=4).program("paths", steps=1)
    states = [program.init(Hierarchy(CHAIN, seed=4).start(i)) for i in range(3)]
    stacked = torch.utils._pytree.tree_map(lambda *xs: torch.stack(xs), *states)
    program.step(states[0], {})  # draws the problem's numbers, which a map must not
    mapped = torch.vmap(lambda state: program.step(state, {})[0].params)(stacked)
    for i, state in enumerate(states):
        alone, _ = program.step(state, {})
        assert all(close(mapped[name][i], alone.params[name]) for name in alone.params)


def test_a_level_whose_work_is_lost_is_told() -> None:
    with pytest.warns(fm.FuncmloWarning, match=r"level 'p2': no level reads it, so nothing comes of it"):
        Hierarchy({"p1": ("p3",), "p2": ("p3",), "p3": ("p1",)}, seed=0).program("paths")
