"""Run by torchrun: levels whose parameters are sharded over processes (DTensor), beside whole ones."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torchopt
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import funcmlo as fm
from tests.registry import ESTIMATORS
from tests.workers.data_parallel import error
from tests.workers.tell import tell


def numbers() -> dict[str, torch.Tensor]:
    """Parameters and data."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (6, 4), "x": (10, 4), "y": (10, 6)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def program(response: fm.BestResponse, x: torch.Tensor, y: torch.Tensor) -> fm.Multilevel:
    """A layer with a learned penalty for each of its inputs."""

    def train(layer: dict, decay: torch.Tensor) -> torch.Tensor:
        return ((torch.tanh(x @ layer["w"].T) - y) ** 2).mean() + (decay.exp() * (layer["w"] ** 2).sum(0)).sum()

    def valid(decay: torch.Tensor, layer: dict) -> torch.Tensor:
        return ((x @ layer["w"].T - y) ** 2).mean() + 0.1 * (decay**2).sum()

    return fm.Multilevel(
        fm.Level("layer", train, torchopt.adam(0.1), steps=3, response=response),
        fm.Level("decay", valid, torchopt.sgd(0.1)),
    )


def full(tree: object) -> object:
    """A tree with whole tensors."""
    return fm._tree.map_tensors(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def main() -> None:
    """Compare every estimator of the registry; try what is refused."""
    with fm.processes() as mine:
        mesh, given = init_device_mesh("cpu", (mine.size,)), numbers()
        spread = {name: distribute_tensor(x, mesh, [Replicate()]) for name, x in given.items()}
        decay = torch.zeros(4, dtype=torch.float64)
        for name, make in ESTIMATORS.items():
            response = make(2.0 * 6, 24)
            whole, sharded = program(response, given["x"], given["y"]), program(response, spread["x"], spread["y"])
            expected = whole.hypergradient(whole.init({"layer": {"w": given["w"]}, "decay": decay}), {}, of="decay")
            shard = distribute_tensor(given["w"], mesh, [Shard(0)])
            state = sharded.init({"layer": {"w": shard}, "decay": distribute_tensor(decay, mesh, [Replicate()])})
            try:
                came = full(sharded.hypergradient(state, {}, of="decay"))
                state, _ = sharded.step(state, {})
            except fm.FuncmloError as refused:
                tell(mine, name, {"refused": str(refused)})
                continue
            kept = state.params["layer"]["w"].placements == (Shard(0),)
            tell(mine, name, {"hypergradient": error(came, expected), "kept": kept}, bits=came)
        tries = {
            "a checkpoint": lambda: fm.save("never", state, step=1),
            "FSDP2": lambda: fm.Stateless(fully_shard(nn.Linear(2, 2), mesh=mesh)).params(),
        }
        for name, attempt in tries.items():
            try:
                attempt()
                tell(mine, name, {"refused": ""})
            except fm.FuncmloError as refused:
                tell(mine, name, {"refused": str(refused)})


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
    sys.stdout.flush()
    os._exit(0)  # a thread of the mesh's process groups may abort the interpreter as it ends: torch 2.13 joins it too late
