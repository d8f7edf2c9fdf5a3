"""One table of estimators × problems × tree structures; a new estimator joins with one line in ESTIMATORS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import ravel, unravel
from funcmlo.problem import Problem
from funcmlo.testing.strategies import trees
from funcmlo.unroll import run

# name -> estimator from (largest eigenvalue of the lower Hessian, number of lower parameters)
ESTIMATORS: dict[str, Callable[[float, int], fm.BestResponse]] = {
    "itd": lambda top, size: fm.ITD(),
    "itd window": lambda top, size: fm.ITD(window=60),
    "itd recompute": lambda top, size: fm.ITD(memory="recompute", offload=True),
    "itd mixed": lambda top, size: fm.ITD(memory="mixed"),
    "itd checkpoint": lambda top, size: fm.ITD(memory=fm.Checkpoint()),
    "itd binary": lambda top, size: fm.ITD(memory=fm.Checkpoint(arity=2, mixed=True)),
    "itd forward": lambda top, size: fm.ITD(mode="forward"),
    "cg": lambda top, size: fm.AID(fm.CG(4 * size + 4, tol=1e-14)),
    "cg nystrom": lambda top, size: fm.AID(fm.CG(4 * size + 4, tol=1e-14, preconditioner=fm.Nystrom(2))),
    "cg recompute": lambda top, size: fm.AID(fm.CG(4 * size + 4, tol=1e-14), curvature=fm.Hessian("recompute")),
    "cg forward": lambda top, size: fm.AID(fm.CG(4 * size + 4, tol=1e-14), curvature=fm.Hessian("forward")),
    "cg difference": lambda top, size: fm.AID(fm.CG(size + 2, tol=1e-7), curvature=fm.Hessian("finite_difference")),
    "cg cross": lambda top, size: fm.AID(fm.CG(4 * size + 4, tol=1e-14), cross="finite_difference"),
    "cg warm": lambda top, size: fm.AID(fm.CG(4 * size + 4, tol=1e-14), warm_start=True),
    "minres": lambda top, size: fm.AID(fm.MINRES(4 * size + 4, tol=1e-14)),
    "gmres": lambda top, size: fm.AID(fm.GMRES(4 * size + 4, tol=1e-14)),
    "normal": lambda top, size: fm.AID(fm.NormalEquations(fm.CG(4 * size + 4, tol=1e-14))),
    "neumann": lambda top, size: fm.AID(fm.Neumann(60, scale=1.0 / top)),
    "neumann adaptive": lambda top, size: fm.AID(fm.Neumann(100)),
    "nystrom": lambda top, size: fm.AID(fm.Nystrom(size + 1, damping=1e-9)),
    "gradient steps": lambda top, size: fm.AID(fm.GradientSteps(torchopt.sgd(1.0 / top), 60)),
    "soba": lambda top, size: fm.AID(
        fm.GradientSteps(torchopt.sgd(1.0 / top), 60), curvature=fm.Resampled(), warm_start=True
    ),
    "direct": lambda top, size: fm.AID(fm.Direct()),
    "damped": lambda top, size: fm.AID(fm.Direct(), curvature=fm.Damped(1e-9)),
    "stocbio": lambda top, size: fm.AID(fm.Neumann(60, scale=1.0 / top), curvature=fm.Resampled()),
    "fixed point": lambda top, size: fm.AID(fm.Neumann(60, scale=1.0), curvature="fixed_point"),
    "fixed point gmres": lambda top, size: fm.AID(fm.GMRES(4 * size + 4, tol=1e-14), curvature="fixed_point"),
    "identity": lambda top, size: fm.AID(fm.Identity()),
    "optimizer identity": lambda top, size: fm.AID(fm.OptimizerIdentity()),
    "one step": lambda top, size: fm.OneStep(),
    "finite difference": lambda top, size: fm.FiniteDifference(),
    "sama": lambda top, size: fm.SAMA(),
    "penalty": lambda top, size: fm.Penalty(1e-2, steps=60),
    "forward gradient": lambda top, size: fm.ForwardGradient(3),
    "perturbed solve": lambda top, size: fm.PerturbedSolve(3),
}

# The farthest any estimator may be from its target on these quadratics, whose eigenvalues are in [1/3, 1]. Krylov and
# dense solves reach rounding times the condition number (squared by the normal equations); K terms of a series and K steps
# of rate 1 leave (2/3)^60 ≈ 3e-11 of J in its least eigenvector, at most 3 times that relative to the whole; a damping
# of 1e-9 leaves 1e-9 / λ_min; the central difference of a linear gradient has rounding √ε times the norms and no other
# error, and the solver's products with it are no better.
ROUNDING, SERIES, DAMPED, DIFFERENCE = 1e-12, 1e-10, 1e-8, 1e-6
RELATIVE = dict.fromkeys(ESTIMATORS, ROUNDING)
RELATIVE |= dict.fromkeys([name for name in ESTIMATORS if name.startswith("itd")], SERIES)
RELATIVE |= dict.fromkeys(["normal", "neumann", "neumann adaptive", "gradient steps", "soba", "stocbio"], SERIES)
RELATIVE |= {"fixed point": SERIES, "nystrom": DAMPED, "damped": DAMPED, "penalty": SERIES}
RELATIVE |= dict.fromkeys(["finite difference", "sama", "cg cross", "perturbed solve"], DIFFERENCE) | {"cg difference": 1e-5}
SAMPLED = ["forward gradient", "perturbed solve"]
"""Those whose answer is a mean over random directions: tests/test_sampling.py holds them to their targets."""
COMPUTED = [name for name in ESTIMATORS if name not in SAMPLED]

OPTIMIZERS: dict[str, Callable[[], object]] = {
    "sgd": lambda: torchopt.sgd(0.1),
    "momentum": lambda: torchopt.sgd(0.05, momentum=0.9),
    "nesterov": lambda: torchopt.sgd(0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "dampened": lambda: torchopt.sgd(0.05, momentum=0.9, dampening=0.3),
    "adam": lambda: torchopt.adam(0.05),
    "adamw": lambda: torchopt.adamw(0.05, weight_decay=0.02),
    "rmsprop": lambda: torchopt.rmsprop(0.02),
    "clipped": lambda: torchopt.chain(torchopt.clip.clip_grad_norm(0.3), torchopt.sgd(0.1, momentum=0.5)),
    "clipped adam": lambda: torchopt.chain(torchopt.clip.clip_grad_norm(0.3), torchopt.adam(0.05)),
    "scheduled": lambda: torchopt.sgd(torchopt.schedule.linear_schedule(0.1, 0.01, 4), momentum=0.5),
}

STRUCTURES: dict[str, Callable[[], object]] = {
    "tensor": lambda: torch.zeros(3),
    "scalar": lambda: torch.zeros(()),
    "one element": lambda: torch.zeros(1, 1),
    "empty tree": dict,
    "empty leaf": lambda: {"a": torch.zeros(0, 2), "b": torch.zeros(2)},
    "dict": lambda: {"w": torch.zeros(2, 2), "b": torch.zeros(2)},
    "nested": lambda: {"a": [torch.zeros(()), (torch.zeros(2), None)], "b": {"c": torch.zeros(1, 2)}},
}


structures = trees


@dataclass(frozen=True)
class Quadratic:
    """g(y, x) = ½ yᵀAy − yᵀ Σ_i B_i x_i with cond(A) known; y*(x) = A⁻¹ Σ B_i x_i and Jᵀ_i v = B_iᵀ A⁻¹ v."""

    a: Tensor
    b: dict[str, Tensor]
    params: object
    inputs: dict[str, object]

    @property
    def top(self) -> float:
        return float(torch.linalg.eigvalsh(self.a)[-1]) if self.a.numel() else 1.0

    def loss(self, y: object, inputs: dict[str, object]) -> Tensor:
        flat = ravel(y).double()
        pull = sum(
            (flat @ (b @ ravel(inputs[name]).double()) for name, b in self.b.items()), torch.zeros((), dtype=torch.float64)
        )
        return 0.5 * flat @ (self.a @ flat) - pull

    def solution(self) -> object:
        right = sum(
            (b @ ravel(self.inputs[name]).double() for name, b in self.b.items()),
            torch.zeros(len(self.a), dtype=self.a.dtype),
        )
        return unravel(torch.linalg.solve(self.a, right), self.params)

    def response(self, v: object) -> dict[str, Tensor]:
        w = torch.linalg.solve(self.a, ravel(v).double())
        return {name: b.T @ w for name, b in self.b.items()}


def quadratic(params: object, inputs: dict[str, object], seed: int, condition: float = 3.0) -> Quadratic:
    """A random quadratic on given trees, with eigenvalues from 1/condition to 1."""
    generator = torch.Generator().manual_seed(seed)
    n = _tree.size(params)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = torch.linalg.qr(normal(n, n))[0] if n else torch.zeros(0, 0, dtype=torch.float64)
    a = q @ torch.diag(torch.logspace(0, -1, n, base=condition, dtype=torch.float64)) @ q.T
    b = {name: normal(n, _tree.size(tree)) for name, tree in inputs.items()}

    def fill(tree: object) -> object:
        return _tree.map(lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype), tree)

    return Quadratic((a + a.T) / 2, b, fill(params), {name: fill(tree) for name, tree in inputs.items()})


def solved(
    loss: Callable[[object, dict[str, object]], Tensor],
    params: object,
    inputs: dict[str, object],
    response: fm.BestResponse,
    optimizer: object = None,
    steps: int = 0,
) -> fm.Solved:
    """Run a level by hand, outside any program, and hand over what an estimator sees."""
    names = list(inputs)
    level = fm.Level(
        "lower",
        lambda own, *trees: loss(own, dict(zip(names, trees, strict=True))),
        optimizer or torchopt.sgd(1.0),
        steps=steps,
        response=response,
        reads={name: name for name in names},
    )
    problem = Problem(level, lambda t: None, seed=0, first=0)
    standing = (params, level.optimizer_for(inputs).init(params))
    return run(problem, standing, inputs, steps, response.requires, response.keep(steps)).solved


def vector_like(tree: object, seed: int) -> object:
    """A random vector of a tree's space."""
    generator = torch.Generator().manual_seed(seed)
    return _tree.map(lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype), tree)
