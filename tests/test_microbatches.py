"""Batches in parts: the same derivatives as of the whole, by the memory of one part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import nn

import funcmlo as fm
from funcmlo import _tree
from funcmlo.comparing.peak_memory import peak_memory
from tests.workers.data_parallel import SIZES, batch, error, first, program

# Sums in another order: rounding, 1e-16 times the condition of these systems, about 10, and the number of steps.
ROUNDING = 1e-12


def in_parts(whole: dict[str, torch.Tensor], *sizes: int) -> fm.Microbatches:
    splits = {name: x.split(sizes) for name, x in whole.items()}
    return fm.Microbatches([{name: parts[i] for name, parts in splits.items()} for i in range(len(sizes))])


SPLITS = {"weights": (5, 4, 3), "points": (6, 1)}


@pytest.mark.parametrize(
    "response",
    [fm.ITD(), fm.ITD(memory="recompute"), fm.ITD(mode="forward"), fm.AID(fm.CG(20, tol=1e-14)), fm.SAMA(0.1), fm.OneStep()],
    ids=repr,
)
def test_parts_give_the_derivatives_of_the_whole(response: fm.BestResponse) -> None:
    solve = program(response, None)
    state = first(solve)
    whole = {level: lambda t, level=level: batch(level, t) for level in SPLITS}
    parts = {level: lambda t, level=level: in_parts(batch(level, t), *SPLITS[level]) for level in SPLITS}
    assert error(solve.hypergradient(state, parts, of="points"), solve.hypergradient(state, whole, of="points")) < ROUNDING
    for _ in range(3):
        (one, expected), (other, came) = solve.step(state, whole), solve.step(state, parts)
        assert error(other.params, one.params) < ROUNDING
        assert error(came["points"]["cost"], expected["points"]["cost"]) < ROUNDING
        state = other


def network(steps: int = 1) -> tuple[fm.Multilevel, fm.State]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Dropout(0.3), nn.Linear(64, 1)).double()
    net = fm.Stateless(module)

    def loss(weights: dict, batch: dict, buffers: dict) -> tuple[torch.Tensor, dict]:
        out, new = net(weights, batch["x"], buffers=buffers)
        hits = (out.detach()[:, 0] > 0).double().mean()
        return F.mse_loss(out[:, 0], batch["y"]), {"buffers": new, "hits": hits, "size": len(out)}

    solve = fm.Multilevel(fm.Level("weights", loss, torchopt.sgd(0.1), steps=steps))
    return solve, solve.init({"weights": net.params()}, buffers={"weights": net.buffers()})


def test_buffers_move_on_from_part_to_part_and_draws_differ() -> None:
    solve, state = network()
    parts = in_parts(batch("weights", 0), 4, 8)
    after, metrics = solve.step(state, {"weights": parts})
    assert int(after.buffers["weights"]["1.num_batches_tracked"]) == 2
    # By hand: the mean of the parts' costs, with the second's statistics after the first's.
    one, told = solve.step(state, {"weights": parts[0]})
    assert float(metrics["weights"]["aux"]["size"]) == 8
    rest = torch.lerp(one.buffers["weights"]["1.running_mean"], after.buffers["weights"]["1.running_mean"], 10.0)
    lone = network()[0].step(state, {"weights": parts[1]})[0].buffers["weights"]["1.running_mean"]
    torch.testing.assert_close(rest, 10 * lone)  # momentum 0.1: new = 0.9 old + 0.1 mean
    hits = [float(told["weights"]["aux"]["hits"])]
    assert 0 <= float(metrics["weights"]["aux"]["hits"]) <= 1
    assert len(hits) == 1
    # The same part twice is not the same draw twice.
    twice = solve.step(state, {"weights": fm.Microbatches([parts[0], parts[0]])})[1]["weights"]["cost"]
    assert float(twice) != float(told["weights"]["cost"])


def test_a_recorded_loop_sees_the_same_draws_as_one_that_is_not() -> None:
    """The gradient part by part and the gradient of one graph are the same numbers, dropout and BatchNorm included."""
    solve, state = network()
    parts = in_parts(batch("weights", 0), 4, 8)
    problem = solve._plan.begin({"weights"}, state, {"weights": parts}, pure=True).problem("weights")
    with torch.no_grad():
        by_part = problem.update(state.params["weights"], state.optimizer["weights"], {}, 0)[0]
    with torch.enable_grad():
        at_once = problem.update(state.params["weights"], state.optimizer["weights"], {}, 0)[0]
    assert error(_tree.detach(at_once), by_part) < ROUNDING


def test_parts_take_the_memory_of_one() -> None:
    weights = {"a": torch.randn(64, 64) / 8, "b": torch.randn(64, 64) / 8}

    def loss(net: dict, batch: torch.Tensor) -> torch.Tensor:
        return ((batch @ net["a"]).tanh() @ net["b"]).square().mean()

    solve = fm.Multilevel(fm.Level("net", loss, torchopt.sgd(0.1)))
    state, whole = solve.init({"net": weights}), torch.randn(8192, 64)
    peaks = [
        peak_memory(lambda given=given: solve.step(state, {"net": given}))[1]
        for given in (whole, fm.Microbatches(whole.split(1024)))
    ]
    # An eighth of the activations, besides two gradients of 32 KiB and the new parameters.
    assert peaks[1] < peaks[0] / 8 + 6 * 2**15


def test_what_parts_cannot_do_is_said() -> None:
    with pytest.raises(fm.BatchError, match=r"Microbatches\(\[\]\): expected at least one batch"):
        fm.Microbatches([])
    solve = fm.Multilevel(fm.Level("y", lambda y, batch: (y * batch).mean(), torchopt.sgd(0.1), tasks=2))
    state = solve.init({"y": torch.zeros(2)})
    with pytest.raises(fm.BatchError, match=r"level 'y' has to do with tasks, and Microbatches came"):
        solve.step(state, {"y": fm.Microbatches([torch.ones(2, 3)])})
    newton = fm.AID(
        fm.CG(3), curvature=fm.GaussNewton(lambda w, points, batch: batch["x"] @ w["w"], lambda f: f.square().mean())
    )
    shared = program(newton, None)
    given = {level: fm.Microbatches([batch(level, 0)]) for level in SIZES if level != "prior"}
    with pytest.raises(fm.BatchError, match=r"level 'weights'.*is evaluated on whole batches, and Microbatches came"):
        shared.hypergradient(first(shared), given, of="points")
