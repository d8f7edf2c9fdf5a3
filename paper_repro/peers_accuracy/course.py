"""The course: the sequence of example weights that all contenders are asked at, and the true hypergradient at each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from funcmlo.errors import FuncmloError
from paper_repro import data
from paper_repro.hypercleaning.problem import Cleaning, Params, draw
from paper_repro.hypercleaning.problem import Settings as CleaningSettings

NEWTON = 30


@dataclass(frozen=True)
class Settings:
    """The problem, the rules and the clock.

    Attributes:
        train: noisy training examples.
        valid: clean validation examples.
        outer: outer steps of the course.
        decay: λ in front of ‖classifier‖².
        upper_lr: the example weights' learning rate (Adam) with which the course was made.
        lower_lr: the rate of the gradient descent with momentum that all contenders make below.
        momentum: its momentum.
        tolerance: the largest relative error that a hypergradient may have.
        free: first outer steps whose error is not held to the tolerance (their time counts).
        begin: how many times its inner steps a contender makes in the first outer step, where it starts from zero.
        memory: pairs that the quasi-Newton optimizer keeps.
        repeats: timed runs of each contender, each in a fresh process.
        limit: seconds that one run may take.
    """

    train: int
    valid: int
    outer: int
    decay: float = 2e-4
    upper_lr: float = 0.1
    lower_lr: float = 5.0
    momentum: float = 0.9
    tolerance: float = 1e-3
    free: int = 5
    begin: int = 10
    memory: int = 100
    repeats: int = 5
    limit: float = 200.0

    def problem(self, seed: int) -> Cleaning:
        """Return one draw of the problem, from scikit-learn's digits."""
        sizes = CleaningSettings(train=self.train, valid=self.valid, outer=self.outer, decay=self.decay)
        return draw(data.load("digits"), sizes, seed)


@dataclass(frozen=True, eq=False)
class Course:
    """What all contenders are asked.

    Attributes:
        weights: x_0, x_1, …, (outer, n) float64.
        gradients: the true hypergradients there, (outer, n) float64.
    """

    weights: Tensor
    gradients: Tensor

    def save(self, path: Path) -> Path:
        """Write it for other processes, and return the path."""
        torch.save({"weights": self.weights, "gradients": self.gradients}, path)
        return path

    @staticmethod
    def load(path: Path) -> Course:
        """Return what `save` has written."""
        return Course(**torch.load(path))

    def error(self, step: int, answer: Tensor) -> float:
        """Return ‖answer − truth‖ / ‖truth‖ at an outer step."""
        truth = self.gradients[step]
        return float((answer.double() - truth).norm() / truth.norm())


def record(settings: Settings, seed: int) -> Course:
    """Clean the labels by Adam on the true hypergradient, in float64.

    Args:
        settings: the problem.
        seed: its draw.

    Returns:
        The course.
    """
    problem = settings.problem(seed)
    weights = torch.zeros(settings.train, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=settings.upper_lr)
    y = {name: p.double() for name, p in problem.classifier().items()}
    asked, answers = [], []
    for _ in range(settings.outer):
        asked.append(weights.detach().clone())
        gradient, y = truth(problem, asked[-1], y)
        answers.append(gradient)
        weights.grad = gradient.clone()
        adam.step()
    return Course(torch.stack(asked), torch.stack(answers))


def truth(problem: Cleaning, x: Tensor, start: Params) -> tuple[Tensor, Params]:
    """Return −∇²_xy g H⁻¹∇_y f with a dense H at the solution, in plain torch.

    Args:
        problem: the data and costs.
        x: the weights, float64.
        start: where Newton's steps on the lower problem start.

    Returns:
        The hypergradient and the solution.

    Raises:
        FuncmloError: Newton's steps do not come to a solution.
    """
    names = list(start)

    def params(flat: Tensor) -> Params:
        parts = torch.split(flat, [p.numel() for p in start.values()])
        return {name: part.view_as(start[name]) for name, part in zip(names, parts, strict=True)}

    def slope(x: Tensor, flat: Tensor) -> Tensor:
        gradient: Tensor = torch.func.grad(lambda at: problem.lower(params(at), x))(flat)
        return gradient

    flat, h = torch.cat([p.reshape(-1) for p in start.values()]), torch.empty(0)
    for _ in range(NEWTON):
        h = torch.func.jacrev(lambda at: slope(x, at))(flat)
        step = torch.linalg.solve(h, slope(x, flat))
        flat = flat - step
        if step.norm() <= 1e-8 * flat.norm():  # the next one would be of rounding's size, and H is right to 1e-8
            break
    else:
        raise FuncmloError(f"the lower problem is not solved after {NEWTON} steps of Newton's; make decay larger.")
    w = torch.linalg.solve(h, torch.func.grad(lambda at: problem.upper(x, params(at)))(flat))
    gradient: Tensor = torch.func.grad(lambda x: -(slope(x, flat) @ w))(x)
    return gradient, params(flat)
