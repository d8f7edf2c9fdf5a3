"""Processes that share batches, tasks or samples give the answer of one, and hold the same bits."""

from __future__ import annotations

import pytest
import torch
import torchopt

import funcmlo as fm
from funcmlo import sharing
from tests.launch import launch
from tests.registry import ESTIMATORS

# Sums over processes are taken in another order: rounding, 1e-16 times the condition of these systems (about 10) and the
# number of products. A difference over a step h divides that by h; chosen from the dtype, h is down to √ε ≈ 1e-8.
ROUNDING, BY_DIFFERENCE = 1e-12, 1e-7
DIFFERENCES = {"cg difference", "cg cross", "finite difference", "sama", "perturbed solve"}


@pytest.fixture(scope="module")
def data() -> dict:
    return launch("-m", "tests.workers.data_parallel")[0]


@pytest.fixture(scope="module")
def tasks() -> dict:
    return launch("-m", "tests.workers.task_parallel")[0]


@pytest.fixture(scope="module")
def long_run() -> dict:
    return launch("-m", "tests.workers.long_run")[0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_shared_batches_give_the_hypergradient_of_their_union(name: str, data: dict) -> None:
    assert ESTIMATORS[name](6.0, 4).claims.data_parallel
    found, allowed = data[name], BY_DIFFERENCE if name in DIFFERENCES else ROUNDING
    assert found["alike"]
    assert found["hypergradient"] < allowed
    assert found["step"] < allowed
    assert found["cost"] < ROUNDING


@pytest.mark.parametrize(
    "name",
    [
        "finite difference, a wide step",
        "sama, a wide step",
        "perturbed solve, a wide step",
        "penalty, a wide step",
        "Gauss–Newton",
        "three levels: paths",
        "three levels: nested",
        "nested ITD",
        "sama at the end",
    ],
)
def test_so_do_wide_differences_gauss_newton_and_hierarchies(name: str, data: dict) -> None:
    assert data[name]["alike"]
    assert data[name]["hypergradient"] < ROUNDING
    assert data[name].get("step", 0.0) < ROUNDING


def test_sama_synchronizes_once_where_it_is_asked_to(data: dict) -> None:
    # One exchange for what is in float64: the gradient, its indirect part, the cost and the number of examples.
    assert data["sama at the end"]["exchanges"] == 1


def test_shared_tasks_give_the_meta_gradient_of_all(tasks: dict) -> None:
    mapped = [name for name in ESTIMATORS if ESTIMATORS[name](6.0, 3).claims.vmap]
    assert set(mapped) < set(tasks)
    assert {"itd: a loop", "cg warm: chunks", "cg: a sum", "itd recompute: going on"} < set(tasks)
    for name, found in tasks.items():
        allowed = BY_DIFFERENCE if name in DIFFERENCES else ROUNDING
        assert found["alike"], name
        assert max(found["hypergradient"], found["step"]) < allowed, name
        assert found["cost"] < ROUNDING, name


def test_processes_hold_the_same_bits_over_50_steps(long_run: dict) -> None:
    assert long_run["50 steps"]["alike"]
    assert long_run["50 steps"]["different"] == 50  # the digests do see the steps


def test_processes_draw_other_numbers_for_their_examples(long_run: dict) -> None:
    assert long_run["draws"]["different"] == 2


@pytest.mark.parametrize(
    "name",
    ["forward gradient", "forward gradient in chunks", "forward gradient one by one", "one sample", "perturbed solve"],
)
def test_shared_samples_are_those_of_one_process(name: str, long_run: dict) -> None:
    assert long_run[name]["alike"]
    assert long_run[name]["hypergradient"] < ROUNDING


def two_levels(**how: object) -> tuple[fm.Level, fm.Level]:
    lower = {"loss": lambda y, x, batch: ((y - x * batch) ** 2).mean(), "optimizer": torchopt.sgd(0.1), **how}
    return fm.Level("y", **lower), fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1))


@pytest.mark.parametrize(
    ("parallel", "how", "message"),
    [
        ("date", {}, r"parallel='date'; expected 'data', 'tasks', 'samples' or None"),
        ("data", {"tasks": 4}, r"'y', 'x' have to do with tasks.*expected parallel='tasks'"),
        ("data", {"loss": lambda y, x: ((y - x) ** 2).sum()}, r"no level's loss takes a batch"),
        (
            "data",
            {"optimizer": fm.Solver(lambda y, x, batch: x * batch.mean()), "response": fm.AID(fm.CG(3))},
            r"level 'y': parallel='data' shares its batch, but its outside solver would see one process's part",
        ),
        ("tasks", {}, r"none has tasks=; expected parallel='data'"),
        ("tasks", {"tasks": 1}, r"level 'y' meets 1 tasks, but 2 processes share them; start at most 1"),
        ("samples", {}, r"no level's response= draws any; expected ForwardGradient"),
    ],
)
def test_what_cannot_be_shared_is_refused(parallel: str, how: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "who", lambda: (0, 2))
    monkeypatch.setattr("funcmlo.roles.who", lambda: (0, 2))
    with pytest.raises(fm.DefinitionError, match=message):
        fm.Multilevel(*two_levels(**how), parallel=parallel)


@pytest.mark.parametrize("reduce", [None, torch.max])
def test_costs_that_look_at_all_tasks_are_refused(reduce: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "who", lambda: (0, 2))
    monkeypatch.setattr("funcmlo.roles.who", lambda: (0, 2))
    lower, _ = two_levels(tasks=4)
    upper = fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1), reduce=reduce)
    with pytest.raises(fm.DefinitionError, match=r"level 'x'.*expected reduce='mean' or 'sum'"):
        fm.Multilevel(lower, upper, parallel="tasks")


@pytest.mark.parametrize("solver", [fm.CG(3, preconditioner=None), "kfac", "preconditioned"])
def test_estimators_that_see_examples_by_other_ways_are_refused(solver: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "who", lambda: (0, 2))
    monkeypatch.setattr("funcmlo.roles.who", lambda: (0, 2))
    net, loss = fm.Stateless(torch.nn.Linear(1, 1)), torch.nn.MSELoss()
    kfac = fm.KFAC(net, loss, data=lambda y, batch: (batch, batch), damping=0.1)
    made = {"kfac": fm.AID(kfac), "preconditioned": fm.AID(fm.CG(3, preconditioner=kfac))}
    response = made[solver] if isinstance(solver, str) else fm.AID(solver)
    assert response.claims.data_parallel == (not isinstance(solver, str))
    lower = fm.Level("y", lambda y, x, batch: loss(net(y, batch), batch) * x, torchopt.sgd(0.1), response=response)
    upper = fm.Level("x", lambda x, y: sum((w**2).sum() for w in y.values()), torchopt.sgd(0.1))
    if response.claims.data_parallel:
        fm.Multilevel(lower, upper, parallel="data")
        return
    with pytest.raises(fm.DefinitionError, match=r"level 'y': AID\(.*KFAC.* does not work with parallel='data'"):
        fm.Multilevel(lower, upper, parallel="data")


def test_nested_programs_share_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "who", lambda: (0, 2))
    monkeypatch.setattr("funcmlo.roles.who", lambda: (0, 2))
    levels = two_levels(response=fm.AID(fm.CG(3)))
    with pytest.raises(fm.DefinitionError, match=r"parallel='samples' came, expected parallel='data'"):
        fm.Multilevel(*levels, composition="nested", parallel="samples")


def test_processes_that_torchrun_started_must_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(fm.DefinitionError, match=r"torchrun started 2 processes.*with fm.processes\(\)"):
        fm.Multilevel(*two_levels(), parallel="data")


def test_alone_a_program_shares_nothing() -> None:
    with fm.processes() as mine:
        assert (mine.rank, mine.size, mine.first) == (0, 1, True)
        program = fm.Multilevel(*two_levels(), parallel="data")
    state = program.init({"y": torch.zeros(2), "x": torch.ones(2)})
    alone = fm.Multilevel(*two_levels()).step(state, {"y": torch.ones(2)})[0]
    assert torch.equal(program.step(state, {"y": torch.ones(2)})[0].params["x"], alone.params["x"])


@pytest.mark.parametrize(("n", "size"), [(5, 2), (4, 4), (7, 3), (2, 3)])
def test_parts_are_consecutive_and_as_even_as_they_can_be(n: int, size: int) -> None:
    parts = [list(range(n))[sharing.part(n, rank, size)] for rank in range(size)]
    assert sum(parts, []) == list(range(n))  # ruff: ignore[quadratic-list-summation]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_source_of_task_batches_may_draw_at_random() -> None:
    """A function of the step is called outside of the map over tasks."""
    lower, upper = two_levels(tasks=3, loss=lambda y, x, batch: ((y - x * batch) ** 2).mean())
    program = fm.Multilevel(lower, upper)
    state = program.init({"y": torch.zeros(3), "x": torch.ones(())})

    def draw(t: int) -> torch.Tensor:
        return torch.randn(3, 2, generator=torch.Generator().manual_seed(t))

    moved, _ = program.step(state, {"y": draw})
    expected = -0.1 * 2 * (0 - draw(0)).mean(1)
    torch.testing.assert_close(moved.params["y"], expected)


@pytest.fixture(scope="module")
def odd() -> dict:
    return launch("-m", "tests.workers.odd")[0]


def test_metrics_are_those_of_all_processes(odd: dict) -> None:
    assert odd["metrics"]["apart"] < ROUNDING
    assert odd["metrics"]["own"] == 0
    assert odd["metrics"]["length"] == 4
    assert "level 'w': the processes' losses returned different metrics" in odd["different metrics"]["refused"]
    assert odd["metrics of tasks"]["distance"] < ROUNDING
    assert odd["metrics of tasks"]["alike"]
    assert odd["metrics of tasks"]["alike counts"]


def test_a_process_whose_examples_touch_nothing_keeps_step(odd: dict) -> None:
    assert odd["untouched"]["alike"]
    assert max(odd["untouched"][name] for name in ("w", "h", "norm")) < ROUNDING


def test_parts_may_differ_in_number_and_sizes_may_be_beyond_half_precision(odd: dict) -> None:
    assert odd["microbatches"]["alike"]
    assert odd["microbatches"]["w"] < ROUNDING
    assert odd["half precision"]["cost"] == 4.0


def test_one_process_may_run_a_program_alone_and_one_interrupt_stops_all(odd: dict) -> None:
    assert odd["alone"]["steps"] == 3
    assert odd["interrupted"] == {"name": "interrupted", "steps": 4, "stopped": "interrupted", "alike": True}


def test_calls_that_cannot_work_are_told(odd: dict) -> None:
    assert "cannot be shared by 2 processes; take larger batches" in odd["too few"]["refused"]
    assert "no longer joined" in odd["left"]["refused"]


@pytest.mark.parametrize("how", [{"roll_back": True}, {"warmup": 3}])
def test_tasks_one_by_one_may_warm_up_and_roll_back(how: dict) -> None:
    """A loop that is recorded and not asked for again must not write costs into what was made without a graph."""

    def gradient(chunk: int | None) -> torch.Tensor:
        lower = fm.Level(
            "y", lambda y, x: ((y - x) ** 2).sum(), torchopt.sgd(0.1), tasks=3, chunk=chunk, response=fm.ITD(), **how
        )
        program = fm.Multilevel(lower, fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)))
        return program.step(program.init({"y": torch.zeros(3, 2), "x": torch.ones(2)}), {})[0].params["x"]

    torch.testing.assert_close(gradient(1), gradient(None))
