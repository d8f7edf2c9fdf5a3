"""Replicas: a program in n copies is n programs, and only their numbers set them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from funcmlo.roles import Roles
from funcmlo.sharing import Sharing

N, EXAMPLES, FEATURES = 64, 12, 3
RESPONSES = {"itd": fm.ITD(), "cg": fm.AID(fm.CG(3)), "neumann": fm.AID(fm.Neumann(3, 0.3)), "fd": fm.FiniteDifference()}
WAYS = [*((name, None) for name in RESPONSES), ("itd", 24), ("neumann", 24), ("neumann", 1)]


def given(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, X_VALID = given(0, N, EXAMPLES, FEATURES), given(1, N, EXAMPLES, FEATURES)
Y, Y_VALID = (given(2, N, EXAMPLES) > 0).double(), (given(3, N, EXAMPLES) > 0).double()
BATCHES = {"w": (X, Y), "decay": (X_VALID, Y_VALID)}


def fit(w: Tensor, decay: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    x, y = batch
    cost = F.binary_cross_entropy_with_logits(x @ w, y) + (decay.exp() * w**2).mean() / 2
    return cost, {"norm": w.norm(), "examples": len(x)}


def validate(decay: Tensor, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.binary_cross_entropy_with_logits(x @ w, y)


def regression(response: fm.BestResponse, lower: Callable[..., Any] = fit, **fields: Any) -> fm.Multilevel:
    return fm.Multilevel(
        fm.Level("w", lower, torchopt.sgd(0.5), steps=4, response=response),
        fm.Level("decay", validate, torchopt.adam(0.1)),
        **fields,
    )


def starts(program: fm.Multilevel, n: int = N) -> list[fm.State]:
    w, decay = given(4, n, FEATURES), given(5, n, FEATURES)
    return [program.init({"w": w[i], "decay": decay[i]}, seed=3) for i in range(n)]


def copy(i: int) -> dict[str, Any]:
    return {name: tuple(x[i] for x in batch) for name, batch in BATCHES.items()}


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    return float((a - b).norm()) <= relative * float(b.norm())


@pytest.mark.parametrize(("name", "chunk"), WAYS)
def test_copies_are_programs_of_their_own(name: str, chunk: int | None) -> None:
    program = regression(RESPONSES[name])
    many = fm.Replicas(program, chunk=chunk)
    # Rounding; finite differences divide it by their step of about 1e-5.
    relative = 1e-7 if name == "fd" else 1e-12
    alone = starts(program)
    state = many.stack(alone)
    for _ in range(2):
        gradients, stats = many.hypergradient(state, BATCHES, of="decay", with_stats=True)
        costs = many.cost(state, BATCHES, of="decay")
        state, metrics = many.step(state, BATCHES)
        for i in range(0, N, 21):
            gradient, own = program.hypergradient(alone[i], copy(i), of="decay", with_stats=True)
            assert close(gradients[i], gradient, relative)
            assert stats["w"].hvps == own["w"].hvps
            if own["w"].residual is not None:
                assert stats["w"].residual.shape == (N,)
                assert abs(float(stats["w"].residual[i]) - own["w"].residual) < 1e-10
            assert close(costs[i], program.cost(alone[i], copy(i), of="decay"), 1e-13)
            alone[i], told = program.step(alone[i], copy(i))
            # Adam divides by the gradient's size, and a small entry has a larger relative error than the whole.
            assert close(state.params["decay"][i], alone[i].params["decay"], 100 * relative)
            assert close(state.params["w"][i], alone[i].params["w"], 100 * relative)
            for level in ("w", "decay"):
                assert close(metrics[level]["costs"][i], told[level]["costs"], 100 * relative)
                assert close(metrics[level]["gradient_norm"][i], told[level]["gradient_norm"], 100 * relative)
            assert close(metrics["w"]["aux"]["norm"][i], told["w"]["aux"]["norm"], 100 * relative)
            assert metrics["w"]["aux"]["examples"] == EXAMPLES
    assert metrics["w"]["costs"].shape == (N, 4)
    assert metrics["decay"]["cost"].shape == (N,)
    assert (state.step, state.seed) == ({"w": 8, "decay": 2}, 3)


def test_a_map_of_torch_does_the_same() -> None:
    program = regression(RESPONSES["cg"])
    state = fm.Replicas(program).stack(starts(program))
    mapped = torch.func.vmap(lambda state, batches: program.step(state, batches)[0])(state, BATCHES)
    after, _ = fm.Replicas(program).step(state, BATCHES)
    for a, b in zip(_tree.leaves(mapped), _tree.leaves(after), strict=True):
        assert torch.equal(a, b)


def test_states_come_apart_again() -> None:
    program = regression(RESPONSES["itd"])
    many, alone = fm.Replicas(program), starts(program, 3)
    back = many.unstack(many.stack(alone))
    for a, b in zip(alone, back, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(_tree.leaves(a), _tree.leaves(b), strict=True))
        assert (a.step, a.seed) == (b.step, b.seed)
        program.step(b, copy(0))


def test_shared_batches_functions_and_iterators() -> None:
    program = regression(RESPONSES["itd"])
    many = fm.Replicas(program)
    state = many.stack(starts(program))
    shared = {"w": (X, Y), "decay": fm.Shared(copy(0)["decay"])}
    repeated = {"w": (X, Y), "decay": tuple(x[:1].expand_as(x) for x in BATCHES["decay"])}
    expected = many.step(state, repeated)[0].params["decay"]
    assert torch.allclose(many.step(state, shared)[0].params["decay"], expected, rtol=1e-13)
    by_step = {"w": lambda t: (X * (t + 1), Y), "decay": iter([shared["decay"]])}
    after, _ = many.step(state, by_step)
    one = {"w": lambda t: (X[5] * (t + 1), Y[5]), "decay": copy(0)["decay"]}
    alone, _ = program.step(starts(program)[5], one)
    assert close(after.params["decay"][5], alone.params["decay"], 1e-11)
    with pytest.raises(fm.BatchError, match=r"once for every 8 copies, and an iterator gives them once; pass a fixed batch"):
        fm.Replicas(program, chunk=8).step(state, {"w": (X, Y), "decay": iter([shared["decay"]])})


def noisy(w: Tensor, decay: Tensor, batch: Any) -> Tensor:
    return ((w - torch.randn(FEATURES, dtype=torch.float64)) ** 2).sum() + (decay * w).sum() / 9


@pytest.mark.parametrize("chunk", [None, 2, 1])
def test_draws(chunk: int | None) -> None:
    program = regression(fm.ITD(), noisy)
    alone = [starts(program, 1)[0]] * 4
    batches = {"w": fm.Shared(None), "decay": fm.Shared(copy(0)["decay"])}
    drawn = {}
    for randomness in ("same", "different"):
        many = fm.Replicas(program, chunk=chunk, randomness=randomness)
        drawn[randomness] = many.step(many.stack(alone), batches)[0].params["w"]
        assert torch.equal(drawn[randomness], many.step(many.stack(alone), batches)[0].params["w"])
    assert torch.allclose(drawn["same"], drawn["same"][:1], rtol=1e-14)
    single, _ = program.step(alone[0], {"w": None, "decay": copy(0)["decay"]})
    assert torch.allclose(drawn["same"][0], single.params["w"], rtol=1e-13)
    assert len({round(float(x), 9) for x in drawn["different"][:, 0]}) == 4


def test_a_program_with_tasks_in_copies() -> None:
    def near(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        return ((y - x * batch) ** 2).sum() / 2

    program = fm.Multilevel(
        fm.Level("y", near, torchopt.sgd(0.3), steps=3, tasks=2, init=lambda x: x, response=fm.ITD()),
        fm.Level("x", lambda x, y: ((y - 1) ** 2).sum(), torchopt.sgd(0.1)),
    )
    many, goals = fm.Replicas(program), given(7, 3, 2, FEATURES)
    alone = [program.init({"x": given(8 + i, FEATURES)}) for i in range(3)]
    after, metrics = many.step(many.stack(alone), {"y": goals})
    for i, state in enumerate(alone):
        own, told = program.step(state, {"y": goals[i]})
        assert close(after.params["x"][i], own.params["x"], 1e-13)
        assert close(metrics["y"]["cost"][i], told["y"]["cost"], 1e-13)


def test_one_copy_that_diverges_leaves_the_others_alone() -> None:
    program = regression(RESPONSES["itd"])
    many = fm.Replicas(program)
    alone = starts(program, 3)
    broken = {**alone[1].params, "w": torch.full((FEATURES,), torch.inf, dtype=torch.float64)}
    states = [alone[0], replace(alone[1], params=broken), alone[2]]
    batches = {name: tuple(x[:3] for x in batch) for name, batch in BATCHES.items()}
    after, metrics = many.step(many.stack(states), batches)
    assert metrics["decay"]["cost"].isfinite().tolist() == [True, False, True]
    assert close(after.params["decay"][2], program.step(alone[2], copy(2))[0].params["decay"], 1e-11)


def test_what_comes_in_is_not_changed() -> None:
    def writes(w: Tensor, decay: Tensor, batch: Any) -> Tensor:
        batch[0].mul_(2)
        return fit(w, decay, batch)[0]

    program = regression(fm.FiniteDifference(), writes)
    many = fm.Replicas(program)
    with pytest.raises(fm.FuncmloError, match=r"changed in place|in-place operation"):  # whoever sees it first
        many.step(many.stack(starts(program)), {"w": (X.clone(), Y), "decay": BATCHES["decay"]})


def test_wrong_use() -> None:
    program = regression(RESPONSES["cg"])
    many, alone = fm.Replicas(program), starts(program, 2)
    nested = regression(RESPONSES["cg"], composition="nested")
    with pytest.raises(
        fm.DefinitionError, match=r"composition=\"nested\" solves again .* cannot be mapped; expected .*chunk=1"
    ):
        fm.Replicas(nested)
    assert fm.Replicas(nested, chunk=1).cost(many.stack(alone), _first(2), of="decay").shape == (2,)
    with pytest.raises(fm.DefinitionError, match="Replicas takes a Multilevel; method came"):
        fm.Replicas(program.step)  # type: ignore[arg-type]
    with pytest.raises(fm.DefinitionError, match=r"Replicas\(chunk=0\); expected an integer of at least 1, or None"):
        fm.Replicas(program, chunk=0)
    with pytest.raises(fm.DefinitionError, match="expected 'different' or 'same'"):
        fm.Replicas(program, randomness="error")  # type: ignore[arg-type]
    sharing = regression(RESPONSES["cg"])
    sharing._plan = replace(sharing._plan, roles=Roles({}, {"w": Sharing("data", 0, 2)}))  # as in two processes
    with pytest.raises(fm.DefinitionError, match="leave parallel= out, and give each process replicas of its own"):
        fm.Replicas(sharing)
    other = program.init({"w": alone[0].params["w"], "decay": alone[0].params["decay"]}, seed=4)
    with pytest.raises(fm.ParameterError, match=r"state 1 has seed 4, state 0 has 3; a map has one .* the same seed="):
        many.stack([alone[0], other])
    with pytest.raises(fm.ParameterError, match=r"tensors of state 1 and of state 0 differ: .*shape \(2,\)"):
        many.stack([alone[0], program.init({"w": torch.zeros(2), "decay": torch.zeros(2)}, seed=3)])
    with pytest.raises(fm.ParameterError, match=r"stack takes the states that program.init returns; dict came"):
        many.stack([{}])  # type: ignore[list-item]
    with pytest.raises(fm.ParameterError, match="expected one number of copies, as stack makes them"):
        many.step(alone[0], BATCHES)
    with pytest.raises(fm.BatchError, match=r"expected \(2, …\), a batch for each of 2 copies of the program, or fm.Shared"):
        many.step(many.stack(alone), BATCHES)
    with pytest.raises(fm.BatchError, match="Microbatches came, and replicas take whole batches"):
        many.step(many.stack(alone), {**_first(2), "w": fm.Microbatches([(X, Y)])})


def test_what_no_map_can_evaluate_is_said() -> None:
    def asks(w: Tensor, decay: Tensor, batch: Any) -> Tensor:
        return (w**2).sum() if float(w.sum()) > 0 else (w * decay).sum()

    program = regression(fm.FiniteDifference(), asks)
    many = fm.Replicas(program)
    with pytest.raises(fm.EstimatorError, match=r"the copies of the program cannot be evaluated together .*chunk=1"):
        many.step(many.stack(starts(program)), BATCHES)


def _first(n: int) -> dict[str, Any]:
    return {name: tuple(x[:n] for x in batch) for name, batch in BATCHES.items()}
