"""Parameters that are sharded over processes: the hypergradients of whole ones, or a plain refusal."""

from __future__ import annotations

import pytest

from tests.launch import launch
from tests.registry import ESTIMATORS

# As in tests/test_processes.py: rounding, and what differences over steps of √ε make of it.
ROUNDING, BY_DIFFERENCE = 1e-12, 1e-7
DIFFERENCES = {"cg difference", "cg cross", "finite difference", "sama"}
REFUSED = {
    # torch 2.13 has no rules for DTensor in forward mode and under its maps …
    "itd forward",
    "itd mixed",
    "itd binary",
    "cg forward",
    "forward gradient",
    "perturbed solve",
    # … nor for what flattens parameters into one vector.
    "cg nystrom",
    "nystrom",
    "gmres",
    "fixed point gmres",
    "neumann adaptive",
    "direct",
    "damped",
}


@pytest.fixture(scope="module")
def told() -> dict:
    return launch("-m", "tests.workers.sharded")[0]


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in REFUSED])
def test_sharded_parameters_give_the_hypergradient_of_whole_ones(name: str, told: dict) -> None:
    assert told[name]["alike"]
    assert told[name]["kept"]
    assert told[name]["hypergradient"] < (BY_DIFFERENCE if name in DIFFERENCES else ROUNDING)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_torch_cannot_do_with_them_is_refused(name: str, told: dict) -> None:
    assert "of sharded parameters (DTensor), for which torch has no rule; use ITD()" in told[name]["refused"]


def test_checkpoints_and_wrapped_modules_are_refused(told: dict) -> None:
    assert "level 'layer': parameters['w'] holds a DTensor" in told["a checkpoint"]["refused"]
    assert "FSDP" in told["FSDP2"]["refused"]
