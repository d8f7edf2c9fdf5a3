"""Task levels: the program of n tasks is n programs, whatever is mapped, chunked or looped over.

The reference for everything is the plain one: each task as a program of its own, and the mean of their hypergradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import ravel
from tests.registry import ESTIMATORS

N = 5
STEPS = 5
CHUNKS = [None, 2, 1]
META = torch.tensor([0.6, -0.4, 0.9], dtype=torch.float64)


def given(seed: int, *shape: int) -> Tensor:
    return torch.rand(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3


CURVE, GOAL, SEEN = given(0, 3), given(1, 3), given(2, 3)


def cost(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Σ (a (y − x b)²/2 + y⁴/40 + x y/5), with another curvature and another goal for each task."""
    a, b = batch
    return (a * (y - x * b) ** 2 / 2 + y**4 / 40 + x * y / 5).sum()


def above(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    return ((y - batch) ** 2).sum() + 0.1 * (x**2).sum()


def many(
    response: fm.BestResponse, *, optimizer: Any = None, reduce: Any = "mean", upper: Any = above, **fields: Any
) -> fm.Multilevel:
    fields = {"init": lambda x: x, "steps": STEPS, **fields}
    lower = fm.Level("y", cost, optimizer or torchopt.sgd(0.3), tasks=N, response=response, **fields)
    return fm.Multilevel(lower, fm.Level("x", upper, torchopt.sgd(0.1), reduce=reduce))


def alone(response: fm.BestResponse, *, optimizer: Any = None, **fields: Any) -> fm.Multilevel:
    fields = {"init": lambda x: x, "steps": STEPS, **fields}
    lower = fm.Level("y", cost, optimizer or torchopt.sgd(0.3), response=response, **fields)
    return fm.Multilevel(lower, fm.Level("x", above, torchopt.sgd(0.1)))


BATCHES = {"y": (CURVE, GOAL), "x": SEEN}


def task(i: int) -> dict[str, Any]:
    return {"y": (CURVE[i], GOAL[i]), "x": SEEN[i]}


# Those that follow steps, sample, or keep a state, one task after the other; the others differ in nothing there.
LOOPED = ("itd", "itd mixed", "cg warm", "forward gradient", "soba", "penalty")
WAYS = [(name, chunk) for name in ESTIMATORS for chunk in (None, 2)] + [(name, 1) for name in LOOPED]


@pytest.mark.parametrize(("name", "chunk"), WAYS)
def test_every_estimator(name: str, chunk: int | None) -> None:
    """Also its state: the second hypergradient starts from what the first one left."""
    response = ESTIMATORS[name](2.0, 3)
    program, single = many(response, chunk=chunk), alone(response)
    state = program.init({"x": META}, seed=4)
    apart = [single.init({"x": META}, seed=4) for _ in range(N)]
    for _ in range(2):
        got = program.hypergradient(state, BATCHES, of="x")
        expected = sum(single.hypergradient(s, task(i), of="x") for i, s in enumerate(apart)) / N
        # Rounding, magnified by differences of costs (divided by a step of about 1e-5) and by conditions below 10.
        loose = {"finite difference", "cg difference", "cg cross", "sama", "penalty", "perturbed solve"}
        assert float((got - expected).norm()) <= (1e-8 if name in loose else 1e-12) * float(expected.norm())
        state, metrics = program.step(state, BATCHES)
        stepped = [single.step(s, task(i)) for i, s in enumerate(apart)]
        x = sum(s.params["x"] for s, _ in stepped) / N
        apart = [s.__class__(**{**vars(s), "params": {**s.params, "x": state.params["x"]}}) for s, _ in stepped]
        assert torch.allclose(state.params["x"], x, rtol=0, atol=1e-7 if name in loose else 1e-12)
        assert torch.allclose(state.params["y"], torch.stack([s.params["y"] for s in apart]), rtol=0, atol=1e-12)
        assert torch.allclose(metrics["y"]["cost"], torch.stack([m["y"]["cost"] for _, m in stepped]).mean())
        assert torch.allclose(metrics["x"]["cost"], torch.stack([m["x"]["cost"] for _, m in stepped]).mean())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    "optimizer",
    [
        torchopt.adam(0.1),
        torchopt.chain(torchopt.clip.clip_grad_norm(0.1), torchopt.sgd(0.5, momentum=0.5)),
        torchopt.rmsprop(0.05, centered=True),
    ],
    ids=["adam", "clipped", "rmsprop"],
)
def test_optimizers_are_each_tasks_own(optimizer: Any, chunk: int | None) -> None:
    program, single = many(fm.ITD(), optimizer=optimizer, chunk=chunk), alone(fm.ITD(), optimizer=optimizer)
    got = program.hypergradient(program.init({"x": META}), BATCHES, of="x")
    expected = sum(single.hypergradient(single.init({"x": META}), task(i), of="x") for i in range(N)) / N
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_solver_stats_are_each_tasks_own() -> None:
    program = many(fm.AID(fm.CG(3, tol=1e-14)))
    _, stats = program.hypergradient(program.init({"x": META}), BATCHES, of="x", with_stats=True)
    assert stats["y"].hvps == 3
    assert stats["y"].residual.shape == (N,)
    assert len(set(stats["y"].residual.tolist())) == N


def test_without_an_init_tasks_go_on_from_where_they_stopped() -> None:
    program, single = many(fm.ITD(), init=None, warmup=3), alone(fm.ITD(), init=None, warmup=3)
    start = given(7, 3)
    state = program.init({"x": META, "y": start})
    apart = [single.init({"x": META, "y": start[i]}) for i in range(N)]
    for _ in range(2):
        state, _ = program.step(state, BATCHES)
        apart = [single.step(s, task(i))[0] for i, s in enumerate(apart)]
        apart = [s.__class__(**{**vars(s), "params": {**s.params, "x": state.params["x"]}}) for s in apart]
        assert torch.allclose(state.params["y"], torch.stack([s.params["y"] for s in apart]), rtol=0, atol=1e-13)
    assert state.step["y"] == 2 * STEPS + 3


def test_rolled_back() -> None:
    program, single = (
        many(fm.FiniteDifference(), init=None, roll_back=True),
        alone(fm.FiniteDifference(), init=None, roll_back=True),
    )
    start = given(7, 3)
    state, _ = program.step(program.init({"x": META, "y": start}), BATCHES)
    apart = [single.step(single.init({"x": META, "y": start[i]}), task(i))[0] for i in range(N)]
    assert state.step["y"] == 1
    # One step from the same start with the mean of the new x, which enters linearly here up to the tasks' own updates.
    x = state.params["x"]
    a, b = CURVE, GOAL
    expected = start - 0.3 * (a * (start - x * b) + start**3 / 10 + x / 5)
    assert torch.allclose(state.params["y"], expected, rtol=0, atol=1e-13)
    assert len(apart) == N


REDUCTIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "mean": ("mean", lambda c: c.mean()),
    "sum": ("sum", lambda c: c.sum()),
    "max": (torch.max, lambda c: c.max()),
    "softmax": (lambda c: torch.logsumexp(c, 0), lambda c: torch.logsumexp(c, 0)),
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str, maximize: bool) -> None:
    """Against the chain rule through the tasks' own costs and hypergradients."""
    reduce, function = REDUCTIONS[name]
    lower = fm.Level("y", cost, torchopt.sgd(0.3), tasks=N, response=fm.ITD(), init=lambda x: x, steps=STEPS)
    program = fm.Multilevel(lower, fm.Level("x", above, torchopt.sgd(0.1), reduce=reduce, maximize=maximize))
    single = alone(fm.ITD())
    state, one = program.init({"x": META}), single.init({"x": META})
    costs = torch.stack([single.cost(one, task(i), of="x") for i in range(N)]).requires_grad_()
    value = function(costs)
    (weights,) = torch.autograd.grad(value, costs)
    expected = sum(w * single.hypergradient(one, task(i), of="x") for i, w in enumerate(weights))
    got = program.hypergradient(state, BATCHES, of="x")
    assert torch.allclose(got, -expected if maximize else expected, rtol=1e-12)
    assert torch.allclose(program.cost(state, BATCHES, of="x"), value.detach(), rtol=1e-12)


def test_a_loss_that_sees_all_tasks() -> None:
    def spread(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        assert y.shape == (N, 3)
        return ((y - batch) ** 2).sum(1).mean() + 0.1 * (x**2).sum()

    program, reference = many(fm.ITD(), upper=spread, reduce=None), many(fm.ITD())
    got = program.hypergradient(program.init({"x": META}), BATCHES, of="x")
    assert torch.allclose(got, reference.hypergradient(reference.init({"x": META}), BATCHES, of="x"), rtol=1e-13)


def test_shared_batches_and_parts_of_them() -> None:
    program, single = many(fm.ITD()), alone(fm.ITD())
    state, one = program.init({"x": META}), single.init({"x": META})
    got = program.hypergradient(state, {"y": (CURVE, fm.Shared(GOAL[0])), "x": fm.Shared(SEEN[1])}, of="x")
    expected = [single.hypergradient(one, {"y": (CURVE[i], GOAL[0]), "x": SEEN[1]}, of="x") for i in range(N)]
    assert torch.allclose(got, sum(expected) / N, rtol=1e-13)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("response", [fm.ITD(), fm.ITD(memory="recompute"), fm.AID(fm.CG(9))], ids=["itd", "again", "cg"])
def test_a_batch_for_each_step(response: fm.BestResponse, chunk: int | None) -> None:
    """From a function of the step's number, or from an iterator: each is drawn once, for all chunks."""

    def source(t: int) -> tuple[Tensor, Tensor]:
        return CURVE + 0.1 * (t % 3), GOAL

    program = many(response, chunk=chunk)
    single = alone(response)
    state, one = program.init({"x": META}), single.init({"x": META})
    indexed = {"y": source, "x": SEEN}
    got = program.hypergradient(state, indexed, of="x")
    apart = [
        single.hypergradient(one, {"y": lambda t, i=i: (source(t)[0][i], GOAL[i]), "x": SEEN[i]}, of="x") for i in range(N)
    ]
    assert torch.allclose(got, sum(apart) / N, rtol=1e-12)
    drawn = iter([source(t) for t in range(STEPS)])
    by_index, _ = program.step(state, indexed)
    by_iterator, _ = program.step(state, {"y": drawn, "x": SEEN})
    assert torch.equal(by_index.params["x"], by_iterator.params["x"])
    assert next(drawn, None) is None


def test_tasks_below_tasks() -> None:
    """Three levels, two of them with tasks that are paired; the middle one's steps are made again by those above."""

    def low(z: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        return (batch * (z - y) ** 2).sum() / 2

    def middle(y: Tensor, x: Tensor, z: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cost(y, x, batch) + 0.1 * (z * y).sum()

    def levels(**tasks: Any) -> list[fm.Level]:
        return [
            fm.Level("z", low, torchopt.sgd(0.5), steps=3, response=fm.ITD(), init=lambda y: 0 * y, **tasks),
            fm.Level("y", middle, torchopt.sgd(0.3), steps=4, response=fm.ITD(), init=lambda x: x, **tasks),
            fm.Level("x", above, torchopt.sgd(0.1)),
        ]

    single = fm.Multilevel(*levels(), composition="nested")
    expected = [single.hypergradient(single.init({"x": META}), {"z": CURVE[i], **task(i)}, of="x") for i in range(N)]
    for composition in ("nested",):
        for chunk in CHUNKS:
            program = fm.Multilevel(*levels(tasks=N, chunk=chunk), composition=composition)
            state = program.init({"x": META})
            got = program.hypergradient(state, {"z": CURVE, **BATCHES}, of="x")
            assert torch.allclose(got, sum(expected) / N, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:composition=.paths. is not the total")
@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.CG(9, tol=1e-14)), fm.FiniteDifference()], ids=str)
def test_tasks_below_tasks_along_paths(response: fm.BestResponse) -> None:
    def low(z: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        return (batch * (z - y) ** 2).sum() / 2

    def middle(y: Tensor, x: Tensor, z: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cost(y, x, batch) + 0.1 * (z * y).sum()

    def levels(**tasks: Any) -> list[fm.Level]:
        return [
            fm.Level("z", low, torchopt.sgd(0.5), steps=3, response=response, init=lambda y: y, **tasks),
            fm.Level("y", middle, torchopt.sgd(0.3), steps=4, response=response, init=lambda x: x, **tasks),
            fm.Level("x", above, torchopt.sgd(0.1)),
        ]

    single = fm.Multilevel(*levels())
    one = single.init({"x": META})
    expected = sum(single.hypergradient(one, {"z": CURVE[i], **task(i)}, of="x") for i in range(N)) / N
    for chunk in CHUNKS:
        program = fm.Multilevel(*levels(tasks=N, chunk=chunk))
        state = program.init({"x": META})
        got = program.hypergradient(state, {"z": CURVE, **BATCHES}, of="x")
        assert torch.allclose(got, expected, rtol=1e-8 if "Finite" in str(response) else 1e-12)
        # A task level's own hypergradient: every task's, stacked.
        own = program.hypergradient(state, {"z": CURVE, **BATCHES}, of="y")
        apart = [single.hypergradient(one, {"z": CURVE[i], **task(i)}, of="y") for i in range(N)]
        assert torch.allclose(own, torch.stack(apart), rtol=1e-8 if "Finite" in str(response) else 1e-12)


def test_a_lower_level_that_all_tasks_share() -> None:
    """A level below, without tasks, whose cost reads the tasks above it: one problem, of the mean of their costs."""

    def shared(z: Tensor, y: Tensor) -> Tensor:
        return ((z - y) ** 2).sum()

    def upper(y: Tensor, batch: Tensor) -> Tensor:
        return ((y - batch) ** 2).sum()

    with pytest.warns(fm.FuncmloWarning, match="no path leads from level 'y'"):
        program = fm.Multilevel(
            fm.Level("z", shared, torchopt.sgd(0.25), steps=60),
            fm.Level("y", upper, torchopt.sgd(0.5), tasks=N),
        )
    state = program.init({"z": torch.zeros(3, dtype=torch.float64), "y": GOAL})
    state, _ = program.step(state, {"y": SEEN})
    assert torch.allclose(state.params["z"], GOAL.mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(state.params["y"], SEEN, rtol=0, atol=1e-15)


def norm_net() -> fm.Stateless:
    torch.manual_seed(0)
    return fm.Stateless(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_each_task_has_its_own_buffers(chunk: int | None) -> None:
    net = norm_net()
    x, y = given(3, 8, 2), given(4, 8, 1)

    def fit(w: Any, batch: Any, buffers: Any) -> Any:
        out, new = net(w, batch[0], buffers=buffers)
        return ((out - batch[1]) ** 2).mean(), {"buffers": new}

    def meta_cost(meta: Any, w: Any, w_buffers: Any, batch: Any) -> Tensor:
        out, _ = net.eval()(w, batch[0], buffers=w_buffers)
        return ((out - batch[1]) ** 2).mean()

    def program(**tasks: Any) -> fm.Multilevel:
        return fm.Multilevel(
            fm.Level("w", fit, torchopt.sgd(0.1), steps=4, response=fm.ITD(), init=lambda meta: meta, **tasks),
            fm.Level("meta", meta_cost, torchopt.sgd(0.1)),
        )

    together, single = program(tasks=N, chunk=chunk), program()
    state = together.init({"meta": net.params()}, buffers={"w": fm.per_task(net.buffers(), N)})
    one = single.init({"meta": net.params()}, buffers={"w": net.buffers()})
    batches = {"w": (x, y), "meta": (x, y)}
    got = ravel(together.hypergradient(state, batches, of="meta"))
    apart = [{"w": (x[i], y[i]), "meta": (x[i], y[i])} for i in range(N)]
    expected = sum(ravel(single.hypergradient(one, b, of="meta")) for b in apart) / N
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-13)
    after, _ = together.step(state, batches)
    buffers = [single.step(one, b)[0].buffers["w"] for b in apart]
    for name, stacked in after.buffers["w"].items():
        assert torch.allclose(stacked, torch.stack([b[name] for b in buffers]), rtol=1e-13)
    assert (after.buffers["w"]["1.num_batches_tracked"] == 4).all()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(4),
    "layer": lambda: nn.LayerNorm(4),
    "instance": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
    "group": lambda: nn.GroupNorm(2, 4),
    "rms": lambda: nn.RMSNorm(4),
}


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize(
    "response",
    [fm.ITD(), fm.ITD(memory="recompute"), fm.ITD(memory="mixed"), fm.AID(fm.CG(6)), fm.FiniteDifference()],
    ids=["itd", "recompute", "mixed", "cg", "difference"],
)
@pytest.mark.parametrize("name", NORMS)
def test_normalized_networks(name: str, response: fm.BestResponse, chunk: int | None) -> None:
    """A map's own rule is wrong for some of them where it is differentiated from outside, twice."""
    mixed = response == fm.ITD(memory="mixed")  # torch's group norm has no forward mode over reverse outside of a map
    got, expected = normalized(name, response, chunk), normalized(name, fm.ITD() if mixed else response, 1)
    # Differences: rounding of a cost of about 1, over a step of about 1e-5.
    assert (got - expected).norm() <= (1e-8 if isinstance(response, fm.FiniteDifference) else 1e-12) * expected.norm()


def normalized(name: str, response: fm.BestResponse, chunk: int | None) -> Tensor:
    torch.manual_seed(0)
    net = fm.Stateless(nn.Sequential(nn.Linear(2, 4), NORMS[name](), nn.Tanh(), nn.Linear(4, 1)).double())
    x, y = given(3, 8, 2), given(4, 8, 1)

    def fit(w: Any, meta: Any, batch: Any) -> Tensor:
        near = sum(((a - b) ** 2).sum() for a, b in zip(w.values(), meta.values(), strict=True))
        return ((net(w, batch[0]) - batch[1]) ** 2).mean() + 0.5 * near

    program = fm.Multilevel(
        fm.Level("w", fit, torchopt.sgd(0.1), steps=3, response=response, init=lambda meta: meta, tasks=N, chunk=chunk),
        fm.Level("meta", lambda meta, w, batch: fit(w, meta, batch), torchopt.sgd(0.1)),
    )
    state = program.init({"meta": {k: p + 0.1 for k, p in net.params().items()}})
    return ravel(program.hypergradient(state, {"w": (x, y), "meta": (x, y)}, of="meta"))


def noisy(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
    return ((y - x) ** 2).sum() / 2 + (torch.rand(3, dtype=torch.float64) * y).sum()


def drawn(randomness: Any, chunk: int | None, seed: int = 0) -> Tensor:
    program = fm.Multilevel(
        fm.Level(
            "y",
            noisy,
            torchopt.sgd(0.5),
            tasks=N,
            steps=2,
            chunk=chunk,
            randomness=randomness,
            init=lambda x: x,
            response=fm.ITD(),
        ),
        fm.Level("x", lambda x, y: (y**3).sum() + (x**2).sum(), torchopt.sgd(0.1)),
    )
    state, _ = program.step(program.init({"x": META}, seed=seed), {"y": SEEN})
    return state.params["y"]


def test_draws_are_shared_or_different() -> None:
    same = [drawn("same", chunk) for chunk in CHUNKS]
    assert all(torch.equal(same[0], other) for other in same)
    assert all(torch.equal(same[0][0], row) for row in same[0])
    for chunk in CHUNKS:
        different = drawn("different", chunk)
        assert all(not torch.allclose(a, b) for a, b in itertools.combinations(different, 2))
        assert torch.equal(different, drawn("different", chunk))
        assert not torch.allclose(different, drawn("different", chunk, seed=1))


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_makes_steps_again_draws_the_same(randomness: Any, chunk: int | None) -> None:
    """A cost's draws belong to its step: two ways through the same steps agree, and so does a solution's own cost."""

    def hypergradient(response: fm.BestResponse) -> Tensor:
        def quartic(y: Tensor, x: Tensor) -> Tensor:
            return (torch.rand(3, dtype=torch.float64) * (y - x) ** 4 + (y - x) ** 2).sum() + (y * x).sum()

        program = fm.Multilevel(
            fm.Level(
                "y",
                quartic,
                torchopt.sgd(0.1),
                tasks=N,
                steps=6,
                chunk=chunk,
                randomness=randomness,
                init=lambda x: 0.5 * x,
                response=response,
            ),
            fm.Level("x", lambda x, y: (y**3).sum(), torchopt.sgd(0.1)),
        )
        return program.hypergradient(program.init({"x": META}), {}, of="x")

    assert torch.allclose(hypergradient(fm.ITD()), hypergradient(fm.ITD(memory="recompute")), rtol=1e-13)
    assert torch.allclose(hypergradient(fm.AID(fm.CG(9, tol=1e-14))), hypergradient(fm.AID(fm.Direct())), rtol=1e-10)


def test_outside_solvers_one_after_the_other() -> None:
    def solve(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.from_numpy((x * batch[1] * 1.0).numpy())

    def quadratic(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[0] * (y - x * batch[1]) ** 2).sum() / 2

    program = fm.Multilevel(
        fm.Level("y", quadratic, fm.Solver(solve), tasks=N, chunk=1, response=fm.AID(fm.Direct())),
        fm.Level("x", lambda x, y, batch: ((y - batch) ** 2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"x": META, "y": GOAL})
    got = program.hypergradient(state, BATCHES, of="x")
    assert torch.allclose(got, (2 * GOAL * (META * GOAL - SEEN)).mean(0), rtol=1e-12)


def test_mapped_once_more() -> None:
    """A program with tasks, over a batch of seeds of its meta-parameters."""
    program = many(fm.AID(fm.CG(9, tol=1e-14)), chunk=2)
    metas = torch.stack([META, 0.5 * META, -META])
    got = torch.func.vmap(lambda m: program.hypergradient(program.init({"x": m}), BATCHES, of="x"))(metas)
    for m, row in zip(metas, got, strict=True):
        assert torch.allclose(row, program.hypergradient(program.init({"x": m}), BATCHES, of="x"), rtol=1e-10)


def test_oracles() -> None:
    program = many(fm.ITD())
    state = program.init({"x": META})
    got = program.hypergradient(state, BATCHES, of="x")
    assert torch.allclose(fm.testing.unrolled(program, state, BATCHES, of="x"), got, rtol=1e-13)
    estimate = fm.testing.finite_difference(program, state, BATCHES, of="x")
    assert (estimate.value - got).abs().max() <= 10 * estimate.error.max() + 1e-12


def test_trees_and_dtypes() -> None:
    def loss(w: Any, meta: Any, batch: Tensor) -> Tensor:
        return ((w["a"].double() @ w["b"][0] - batch) ** 2).sum() + _tree.dot(w["b"], w["b"]).double()

    program = fm.Multilevel(
        fm.Level("w", loss, torchopt.adam(0.1), tasks=2, steps=3, init=lambda meta: meta, response=fm.ITD()),
        fm.Level("meta", lambda meta, w, batch: loss(w, meta, batch), torchopt.adam(0.1)),
    )
    meta = {"a": torch.ones(2, 2), "b": (torch.ones(2, dtype=torch.float64), torch.zeros(()))}
    state = program.init({"meta": meta})
    state, _ = program.step(state, {"w": torch.ones(2, 2), "meta": fm.Shared(torch.ones(2))})
    assert state.params["w"]["a"].shape == (2, 2, 2)
    assert state.params["w"]["a"].dtype == torch.float32
    assert state.params["meta"]["b"][1].dtype == torch.float32


def level(name: str = "y", loss: Any = cost, **fields: Any) -> fm.Level:
    return fm.Level(name, loss, torchopt.sgd(0.1), **fields)


def two(lower: fm.Level, upper: fm.Level | None = None) -> fm.Multilevel:
    return fm.Multilevel(lower, upper or level("x", above))


def stepped(batches: Any) -> object:
    program = many(fm.ITD())
    return program.step(program.init({"x": META}), batches)


def recurrent(chunk: int | None) -> dict[str, Tensor]:
    net = fm.Stateless(nn.LSTM(2, 3, batch_first=True).double())

    def fit(w: Any, batch: Tensor) -> Tensor:
        return (net(w, batch)[0] ** 2).mean()

    program = fm.Multilevel(
        fm.Level("w", fit, torchopt.sgd(0.1), steps=2, tasks=N, chunk=chunk, init=lambda m: m, response=fm.ITD()),
        fm.Level("m", lambda m, w, batch: fit(w, batch), torchopt.sgd(0.1)),
    )
    sequences = given(5, 3, 4, 2)
    return program.hypergradient(program.init({"m": net.params()}), {"w": sequences, "m": sequences}, of="m")


def test_one_after_the_other_where_a_layer_knows_no_map() -> None:
    assert all(torch.isfinite(g).all() and g.norm() > 0 for g in recurrent(1).values())


def test_attention_in_tasks_is_computed_by_its_formula() -> None:
    """No map knows the fused kernels: they would warn, and run one lane after the other."""

    def fit(w: Tensor, batch: Tensor) -> Tensor:
        q = (batch @ w)[None, None]
        return (nn.functional.scaled_dot_product_attention(q, q, q) ** 2).mean()

    def hypergradient(chunk: int | None) -> Tensor:
        program = fm.Multilevel(
            fm.Level("w", fit, torchopt.sgd(0.1), steps=2, tasks=N, chunk=chunk, init=lambda m: m, response=fm.ITD()),
            fm.Level("m", lambda m, w, batch: fit(w, batch), torchopt.sgd(0.1)),
        )
        state = program.init({"m": torch.eye(4, dtype=torch.float64)})
        return program.hypergradient(state, {"w": given(5, 3, 4), "m": given(6, 3, 4)}, of="m")

    assert torch.allclose(hypergradient(None), hypergradient(1), rtol=1e-12)


D, P = fm.DefinitionError, fm.ParameterError
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no number": (lambda: level(tasks=0), D, r"tasks=0; expected an integer of at least 1, or None"),
    "no chunk": (lambda: level(tasks=2, chunk=1.5), D, r"chunk=1.5; expected an integer"),
    "no randomness": (lambda: level(tasks=2, randomness="error"), D, r"'error'; expected 'different' or 'same'"),
    "no reduction": (lambda: level(reduce="max"), D, r"reduce='max'; expected 'mean', 'sum', a function"),
    "a reduction of its own tasks": (lambda: level(tasks=2, reduce="sum"), D, r"with tasks= it has no meaning"),
    "numbers that differ": (
        lambda: fm.Multilevel(
            level("a", lambda a: a.sum(), tasks=2),
            level("b", lambda b, a: (a * b).sum(), tasks=3),
            level("c", lambda c, b: 0),
        ),
        D,
        r"level 'b' meets different numbers of tasks \(3 in 'b', 2 in 'a'\)",
    ),
    "an optimizer of tasks": (
        lambda: fm.Multilevel(
            level("a", lambda a: a.sum(), tasks=2), fm.Level("b", lambda b, a: (a * b).sum(), lambda a: torchopt.sgd(a))
        ),
        D,
        r"level 'b': its init, optimizer or projection reads 'a', which has tasks, and it has none itself",
    ),
    "tasks above one problem": (
        lambda: fm.Multilevel(
            level("z", lambda z, y: ((z - y) ** 2).sum()), level("y", lambda y, z: (y * z).sum(), tasks=2)
        ),
        D,
        r"level 'y' has tasks, but its hypergradient runs through 'z', which has none.*Give that level tasks=2 too",
    ),
    "buffers of its own": (
        lambda: two(level(tasks=2), level("x", lambda x, y, batch, buffers: 0)),
        D,
        r"level 'x': its loss is evaluated for each task of 'y', so it cannot move its own buffers on.*reduce=None",
    ),
    "parameters of one task": (
        lambda: two(level(tasks=2)).init({"x": META, "y": META}),
        P,
        r"level 'y' has 2 tasks, but its parameter  has shape \(3,\); expected \(2, …\), as fm.per_task\(tree, 2\)",
    ),
    "a batch of one task": (
        lambda: stepped({"y": (CURVE[0], GOAL), "x": SEEN}),
        fm.BatchError,
        r"level 'y': a tensor of its batch has shape \(3,\); expected \(5, …\).*fm.Shared\(batch\)",
    ),
    "a batch of one task above": (
        lambda: stepped({"y": (CURVE, GOAL), "x": SEEN[0]}),
        fm.BatchError,
        r"level 'x': a tensor of its batch has shape \(3,\)",
    ),
    "a shared batch without tasks": (
        lambda: alone(fm.ITD()).step(alone(fm.ITD()).init({"x": META}), {"y": fm.Shared((CURVE, GOAL)), "x": SEEN[0]}),
        fm.BatchError,
        r"batches\['y'\] is fm.Shared, but level 'y' has no tasks and reads none; pass the batch itself",
    ),
    "a layer that no map knows": (
        lambda: recurrent(None),
        fm.EstimatorError,
        r"the tasks cannot be evaluated together by torch.func.vmap \(Batching rule not implemented.*chunk=1",
    ),
    "a comparison": (
        lambda: fm.compare([fm.ITD()], many(fm.ITD()), many(fm.ITD()).init({"x": META}), BATCHES),
        D,
        r"compare looks at one inner problem at a time, but 'y' stands for that of every task",
    ),
    "a reduction to no scalar": (
        lambda: many(fm.ITD(), reduce=lambda c: c).step(many(fm.ITD()).init({"x": META}), BATCHES),
        fm.LossError,
        r"level 'x': its loss returned a tensor of shape \(5,\); expected a scalar",
    ),
    "a solver that leaves torch": (
        lambda: two(
            fm.Level(
                "y", cost, fm.Solver(lambda y, x, batch: torch.from_numpy(y.numpy())), tasks=N, response=fm.AID(fm.CG(3))
            )
        ).step(two(level(tasks=N)).init({"x": META, "y": GOAL}), BATCHES),
        fm.EstimatorError,
        r"level 'y': its solver failed under a torch.func transform.*chunk=1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name: str) -> None:
    run, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        run()
