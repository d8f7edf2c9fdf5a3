"""Buffers: moved on once per update, seen by all that belongs to it, differentiated by nothing.

The reference is the same program with the buffers' values as its batches: where buffers move on by themselves, the two
must agree to the bit, whoever the estimator is and however it makes steps again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from tests.registry import ESTIMATORS

X = torch.tensor([0.7, -0.3, 1.1], dtype=torch.float64)
START = {"m": torch.tensor([0.4, 0.2, -0.5], dtype=torch.float64), "count": torch.zeros((), dtype=torch.long)}
STEPS = 12


def moved(b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The next buffers: m ← 0.6 m + 0.1 sin(count), which is exact to repeat."""
    return {"m": 0.6 * b["m"] + 0.1 * torch.sin(b["count"].double()), "count": b["count"] + 1}


def series(t: int) -> Tensor:
    """The value of m before step t."""
    b = START
    for _ in range(t):
        b = moved(b)
    return b["m"]


def energy(y: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """½ Σ (1 + m²)(y − x)²/2 + (x m) y: its Hessian and its cross derivative depend on m."""
    return (0.5 * (0.5 + m**2) * (y - x) ** 2 + x * m * y).sum()


def with_buffers(y: Tensor, x: Tensor, buffers: dict[str, Tensor]) -> Any:
    return energy(y, x, buffers["m"]), {"buffers": moved(buffers), "told": buffers["count"]}


def with_batches(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
    return energy(y, x, batch)


def above(x: Tensor, y: Tensor) -> Tensor:
    return ((y - 1) ** 2).sum() + 0.1 * (x**4).sum()


def programs(response: fm.BestResponse, **fields: Any) -> tuple[fm.Multilevel, fm.Multilevel]:
    made = []
    for cost in (with_buffers, with_batches):
        # Levels with buffers are not replayed, and a replayed derivative is another by rounding.
        lower = fm.Level("y", cost, torchopt.sgd(0.5), steps=STEPS, response=response, replay=False, **fields)
        made.append(fm.Multilevel(lower, fm.Level("x", above, torchopt.sgd(0.1))))
    return made[0], made[1]


def first(program: fm.Multilevel, **given: Any) -> fm.State:
    return program.init({"y": torch.zeros_like(X), "x": X}, seed=3, **given)


# Resampled products ask for later batches, and there are no later buffers: those of the last step serve all of them.
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in ("soba", "stocbio")])
def test_all_of_a_step_sees_its_buffers(name: str) -> None:
    a, b = programs(ESTIMATORS[name](1.0, 3))
    state, other = first(a, buffers={"y": START}), first(b)
    for step in (1, 2):
        got = a.hypergradient(state, {}, of="x")
        assert torch.equal(got, b.hypergradient(other, {"y": series}, of="x"))
        state, metrics = a.step(state, {})
        other, _ = b.step(other, {"y": series})
        assert torch.equal(state.params["x"], other.params["x"])
        assert int(state.buffers["y"]["count"]) == step * STEPS
        assert torch.equal(state.buffers["y"]["m"], series(step * STEPS))
        assert metrics["y"]["aux"] == {"told": torch.tensor(step * STEPS - 1)}


@pytest.mark.filterwarnings("ignore:composition=.paths. is not the total")
@pytest.mark.parametrize("composition", ["paths", "nested"])
def test_three_levels(composition: Any) -> None:
    """The middle level carries buffers too; its steps are made again with those that each of them saw."""

    def middle(y: Tensor, x: Tensor, z: Tensor, buffers: dict[str, Tensor]) -> Any:
        return energy(y, x, buffers["m"]) + (y * z).sum(), {"buffers": moved(buffers)}

    def middle_batches(y: Tensor, x: Tensor, z: Tensor, batch: Tensor) -> Tensor:
        return energy(y, x, batch) + (y * z).sum()

    def low(z: Tensor, y: Tensor) -> Tensor:
        return ((z - 0.3 * y) ** 2).sum()

    answers = []
    for cost in (middle, middle_batches):
        program = fm.Multilevel(
            fm.Level("z", low, torchopt.sgd(0.25), steps=3, response=fm.ITD()),
            fm.Level("y", cost, torchopt.sgd(0.3), steps=4, response=fm.ITD()),
            fm.Level("x", above, torchopt.sgd(0.1)),
            composition=composition,
        )
        params = {"z": torch.zeros_like(X), "y": torch.zeros_like(X), "x": X}
        carries = cost is middle
        state = program.init(params, buffers={"y": START} if carries else None)
        batches = {} if carries else {"y": series}
        for _ in range(2):
            state, _ = program.step(state, batches)
        answers.append(program.hypergradient(state, batches, of="x"))
        if carries:
            assert int(state.buffers["y"]["count"]) == 8
    assert torch.equal(*answers)


def test_roll_back_returns_them() -> None:
    program, _ = programs(fm.FiniteDifference(), roll_back=True)
    state, _ = program.step(first(program, buffers={"y": START}), {})
    assert int(state.buffers["y"]["count"]) == 1
    assert torch.equal(state.buffers["y"]["m"], series(1))


def test_a_warm_up_moves_them() -> None:
    program, _ = programs(fm.FiniteDifference(), warmup=7)
    state, _ = program.step(first(program, buffers={"y": START}), {})
    assert int(state.buffers["y"]["count"]) == STEPS + 7


def test_another_levels_buffers_are_those_that_its_loop_left() -> None:
    seen = []

    def reading(x: Tensor, y: Tensor, y_buffers: dict[str, Tensor]) -> Tensor:
        seen.append(int(y_buffers["count"]))
        return above(x, y)

    program = fm.Multilevel(
        fm.Level("y", with_buffers, torchopt.sgd(0.5), steps=5, response=fm.ITD()),
        fm.Level("x", reading, torchopt.sgd(0.1)),
    )
    state = first(program, buffers={"y": START})
    program.hypergradient(state, {}, of="x")
    assert set(seen) == {5}
    assert int(state.buffers["y"]["count"]) == 0
    state, _ = program.step(state, {})
    program.cost(state, {}, of="x")
    assert seen[-1] == 10
    program.cost(state, {}, of="x", solve=False)
    assert seen[-1] == 5


def test_a_top_level_has_its_own() -> None:
    def own(x: Tensor, y: Tensor, buffers: dict[str, Tensor]) -> Any:
        return above(x, y), {"buffers": moved(buffers)}

    lower = fm.Level("y", lambda y, x: energy(y, x, START["m"]), torchopt.sgd(0.5), steps=2, response=fm.ITD())
    program = fm.Multilevel(lower, fm.Level("x", own, torchopt.sgd(0.1), steps=3))
    state = first(program, buffers={"x": START})
    state, metrics = program.step(state, {})
    assert int(state.buffers["x"]["count"]) == 3
    assert metrics["x"]["aux"] == {}


def test_programs_mapped_over_buffers() -> None:
    program, _ = programs(fm.ITD())
    states = [first(program, buffers={"y": {**START, "m": START["m"] * k}}) for k in (1.0, 2.0)]
    many = torch.stack([s.buffers["y"]["m"] for s in states])
    count = torch.zeros(2, dtype=torch.long)

    def stepped(m: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        state, _ = program.step(first(program, buffers={"y": {"m": m, "count": n}}), {})
        return state.params["x"], state.buffers["y"]["m"]

    xs, ms = torch.func.vmap(stepped)(many, count)
    for i, state in enumerate(states):
        one, _ = program.step(state, {})
        assert torch.allclose(xs[i], one.params["x"], rtol=0, atol=1e-14)
        assert torch.allclose(ms[i], one.buffers["y"]["m"], rtol=0, atol=1e-15)


@pytest.mark.parametrize("response", [fm.ITD(), fm.ITD(memory="recompute"), fm.AID(fm.CG(9))], ids=str)
def test_nothing_is_differentiated_by_them(response: fm.BestResponse) -> None:
    """Whether the loss cuts them from its graph or not."""

    def cost(cut: bool) -> Callable[..., Any]:
        def loss(y: Tensor, x: Tensor, buffers: dict[str, Tensor]) -> Any:
            new = 0.6 * buffers["m"] + 0.1 * y * x
            return energy(y, x, buffers["m"]), {"buffers": {"m": new.detach() if cut else new}}

        return loss

    answers = []
    for cut in (True, False):
        lower = fm.Level("y", cost(cut), torchopt.sgd(0.5), steps=STEPS, response=response)
        program = fm.Multilevel(lower, fm.Level("x", above, torchopt.sgd(0.1)))
        state = program.init({"y": torch.zeros_like(X), "x": torch.ones_like(X)}, buffers={"y": {"m": START["m"]}})
        answers.append(program.hypergradient(state, {}, of="x"))
        after, _ = program.step(state, {})
        assert not after.buffers["y"]["m"].requires_grad
    assert torch.equal(*answers)


def test_oracles_see_them() -> None:
    program, reference = programs(fm.ITD())
    state, other = first(program, buffers={"y": START}), first(reference)
    for _ in range(2):
        state, _ = program.step(state, {})
        other, _ = reference.step(other, {"y": series})
    for oracle in (fm.testing.unrolled, fm.testing.finite_difference):
        got, expected = oracle(program, state, {}, of="x"), oracle(reference, other, {"y": series}, of="x")
        got, expected = getattr(got, "value", got), getattr(expected, "value", expected)
        assert torch.equal(got, expected)


def wrong(cost: Callable[..., Any], buffers: Any = START) -> Callable[[], object]:
    def run() -> object:
        lower = fm.Level("y", cost, torchopt.sgd(0.5), response=fm.ITD())
        program = fm.Multilevel(lower, fm.Level("x", above, torchopt.sgd(0.1)))
        return program.step(first(program, buffers={"y": buffers} if buffers is not None else {}), {})

    return run


def written_to(y: Tensor, x: Tensor, buffers: dict[str, Tensor]) -> Any:
    buffers["m"].mul_(0.5)
    return energy(y, x, buffers["m"]), {"buffers": buffers}


WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no new ones": (
        wrong(lambda y, x, buffers: energy(y, x, buffers["m"])),
        fm.LossError,
        r"level 'y': its loss reads buffers, but returned no new ones; expected \(cost, \{'buffers': new\}\)",
    ),
    "other ones": (
        wrong(lambda y, x, buffers: (energy(y, x, buffers["m"]), {"buffers": {"m": buffers["m"]}})),
        fm.LossError,
        r"the buffers that its loss returned and those it got differ: structure",
    ),
    "another shape": (
        wrong(lambda y, x, buffers: (energy(y, x, buffers["m"]), {"buffers": {**buffers, "m": buffers["m"].sum()}})),
        fm.LossError,
        r"differ: leaf \['m'\] has shape \(\), expected \(3,\)",
    ),
    "none given": (
        wrong(with_buffers, None),
        fm.ParameterError,
        r"no buffers for level 'y', which the loss of level 'y' reads as 'buffers'; pass buffers=\{'y': net.buffers\(\)\}",
    ),
    "no tensor": (
        wrong(with_buffers, {"m": 1.0}),
        fm.ParameterError,
        r"level 'y': buffer \['m'\] is float; expected a tensor",
    ),
    "no dict": (
        lambda: first(programs(fm.ITD())[0], buffers=[START]),
        fm.ParameterError,
        r"takes buffers= as a dict from level names to buffers; list came",
    ),
    "of no level": (
        lambda: first(programs(fm.ITD())[0], buffers={"net": START}),
        fm.ParameterError,
        r"got buffers for 'net', which is no level",
    ),
    "written to": (wrong(written_to), fm.LossError, r"the buffers of level 'y' were changed in place"),
    "read of no level": (
        wrong(lambda y, x, net_buffers: energy(y, x, net_buffers["m"])),
        fm.DefinitionError,
        r"its loss reads 'net_buffers', but 'net' is no level",
    ),
    "its own by name": (
        wrong(lambda y, x, y_buffers: energy(y, x, y_buffers["m"])),
        fm.DefinitionError,
        r"its loss reads 'y_buffers', its own buffers; call that argument 'buffers'",
    ),
    "read by an init": (
        lambda: fm.Level("y", with_batches, torchopt.sgd(0.1), init=lambda x, x_buffers: x),
        fm.DefinitionError,
        r"its init reads 'x_buffers'; only a loss can read buffers",
    ),
    "in a function": (
        lambda: fm.argmin(with_buffers, torchopt.sgd(0.1), steps=3, response=fm.ITD()),
        fm.DefinitionError,
        r"argmin: its loss reads 'buffers', but a function keeps no buffers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name: str) -> None:
    run, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        run()
