"""The bilevel test functions of Sinha, Malo and Deb whose lower solution is unique where it starts, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.errors import DefinitionError
from funcmlo.testing.known import Bilevel, normals, until_converged

_STRICT: frozenset[Assumption] = frozenset({"minimization", "positive definite", "nonsingular"})

_Map = Callable[[Tensor], Tensor]


def _square(z: Tensor) -> Tensor:
    return (z**2).sum()


def _rastrigin(z: Tensor) -> Tensor:
    return z.numel() + (z**2 - torch.cos(2 * torch.pi * z)).sum()


def _banana(z: Tensor) -> Tensor:
    return ((z[1:] - z[:-1] ** 2) ** 2 + (z[:-1] - 1) ** 2).sum()


def _ackley(z: Tensor) -> Tensor:
    waves = torch.exp(torch.cos(2 * torch.pi * z).mean())
    return 20 + torch.e - 20 * torch.exp(-0.2 * torch.sqrt((z**2).mean())) - waves


def _griewank(z: Tensor) -> Tensor:
    roots = torch.arange(1, len(z) + 1, device=z.device).to(z.dtype).sqrt()
    return 1 + _square(z) / 400 - torch.cos(z / roots).prod()


class _SMD(NamedTuple):
    """The terms of one problem; a(u₂) = b(z₂) at the lower solution z₂ = c(u₂)."""

    own: _Map  # f₂, whose minimum is where z₁ is all `at`
    at: float
    sign: float  # of the interaction a(u₂) − b(z₂) in F: −1 where the levels conflict
    sign_own: float  # of F₂
    a: _Map
    b: _Map
    c: _Map
    slope: _Map  # c'
    upper: _Map = _square  # F₁
    lower: _Map = _square  # f₁
    upper_own: _Map | None = None  # F₂ up to its sign, where it is not Σ z₁²


def _same(u: Tensor) -> Tensor:
    return u


_PROBLEMS = {
    1: _SMD(_square, 0, 1, 1, _same, torch.tan, torch.atan, lambda u: 1 / (1 + u**2)),
    2: _SMD(_square, 0, -1, -1, _same, torch.log, torch.exp, torch.exp),
    3: _SMD(_rastrigin, 0, 1, 1, torch.square, torch.tan, lambda u: torch.atan(u**2), lambda u: 2 * u / (1 + u**4)),
    4: _SMD(
        _rastrigin, 0, -1, -1, torch.abs, torch.log1p, lambda u: u.abs().expm1(), lambda u: u.sign() * torch.exp(u.abs())
    ),
    5: _SMD(
        *(_banana, 1, -1, -1, torch.abs, torch.square),
        *(lambda u: u.abs().sqrt(), lambda u: u.sign() / (2 * u.abs().sqrt())),
        upper_own=_banana,
    ),
    7: _SMD(*(_square, 0, -1, -1, _same, torch.log, torch.exp, torch.exp), upper=_griewank, lower=lambda u: (u**3).sum()),
    8: _SMD(
        *(_banana, 1, -1, -1, _same, lambda z: z**3),
        *(lambda u: u.sign() * u.abs() ** (1 / 3), lambda u: u.abs() ** (-2 / 3) / 3),
        upper=_ackley,
        lower=lambda u: u.abs().sum(),
        upper_own=_banana,
    ),
}


@dataclass(frozen=True, repr=False, eq=False)
class SMD(Bilevel):
    """The unconstrained problems SMD1–5, 7 and 8 of Sinha, Malo and Deb, at a point inside their domain.

    The lower cost is f₁(u₁) + f₂(z₁) + Σ (a(u₂) − b(z₂))², the upper one F₁(u₁) + F₂(z₁) + Σ u₂² ± Σ (a(u₂) − b(z₂))², with
    x = {"u1", "u2"} and y = {"z1", "z2"}. So z₁* is constant and z₂* = b⁻¹(a(u₂)): atan u₂ in SMD1, exp u₂ in SMD2 and 7,
    atan u₂² in SMD3, exp |u₂| − 1 in SMD4, √|u₂| in SMD5, ∛u₂ in SMD8. SMD6 has many lower solutions and is not here;
    SMD3 and 4 have other local minima by z₁, SMD5 has −√|u₂| too, so that there the start decides.

    In all of them ∇_y F = 0 at the lower solution: the hypergradient is ∂F/∂x alone. That is how the authors' problems
    are; to see that an estimator is right, multiply the response by another vector.

    Args:
        number: which problem.
        seed: decides the point.

    Raises:
        DefinitionError: there is no such problem here.

    Example:
        >>> import torch
        >>> problem = SMD(1)
        >>> torch.allclose(problem.solution()["z2"], torch.atan(problem.x["u2"]))
        True

    References:
        Sinha, Malo and Deb 2014, Test problem construction for single-objective bilevel optimization, Evolutionary
        Computation 22(3), arXiv 1401.1942.
    """

    number: int
    seed: int = 0

    assumptions: ClassVar[frozenset[Assumption]] = _STRICT

    def __post_init__(self) -> None:
        """Refuse numbers that are not in the table."""
        if self.number not in _PROBLEMS:
            raise DefinitionError(f"SMD({self.number!r}): expected one of {', '.join(map(str, _PROBLEMS))}.")

    @cached_property
    def _drawn(self) -> tuple[Tree, Tree]:
        normal = normals(self.seed)
        # |u₂| in [0.2, 0.5]: far from the kinks of |u| and √, from the poles of tan and log.
        u2 = torch.sign(normal(2)) * (0.2 + 0.3 * torch.sigmoid(normal(2)))
        z1 = self._terms.at + 0.05 * torch.tanh(normal(2))
        z2 = self._terms.c(u2) * (1 + 0.05 * torch.tanh(normal(2)))
        return {"u1": 0.5 + 0.5 * torch.sigmoid(normal(2)), "u2": u2}, {"z1": z1, "z2": z2}

    @property
    def _terms(self) -> _SMD:
        return _PROBLEMS[self.number]

    @property
    def name(self) -> str:
        """SMD and the number."""
        return f"SMD{self.number}"

    @property
    def x(self) -> Tree:
        """The upper parameters at which everything is evaluated."""
        return self._drawn[0]

    @property
    def start(self) -> Tree:
        """Where an inner loop starts: in the basin of the global minimum."""
        return self._drawn[1]

    def inner(self, y: Tree, x: Tree) -> Tensor:
        """Return f₁ + f₂ + f₃."""
        t = self._terms
        return t.lower(x["u1"]) + t.own(y["z1"]) + _square(t.a(x["u2"]) - t.b(y["z2"]))

    def outer(self, x: Tree, y: Tree) -> Tensor:
        """Return F₁ + F₂ + F₃."""
        t = self._terms
        own = (t.upper_own or _square)(y["z1"])
        return t.upper(x["u1"]) + t.sign_own * own + _square(x["u2"]) + t.sign * _square(t.a(x["u2"]) - t.b(y["z2"]))

    def solution(self) -> Tree:
        """Return y*(x)."""
        return {"z1": torch.full_like(self.start["z1"], self._terms.at), "z2": self._terms.c(self.x["u2"])}

    def response(self, v: Tree) -> Tree:
        """Return Jᵀv."""
        return {"u1": torch.zeros_like(self.x["u1"]), "u2": self._terms.slope(self.x["u2"]) * v["z2"]}

    @cached_property
    def _spectrum(self) -> Tensor:
        """The eigenvalues of the Hessian at the solution, in blocks: 2b'(z₂)² and those of f₂."""
        y = self.solution()
        b = torch.func.grad(lambda z: self._terms.b(z).sum())(y["z2"])
        return torch.cat([2 * b**2, torch.linalg.eigvalsh(torch.func.jacrev(torch.func.grad(self._terms.own))(y["z1"]))])

    @property
    def rate(self) -> float:
        """1.6/λ_max at the solution: below 2/λ_max by more than the Hessian changes on the way."""
        return 1.6 / float(self._spectrum.max())

    @property
    def steps(self) -> int:
        """Steps that leave about 1e-14 of the start's distance."""
        return until_converged(float((1 - self.rate * self._spectrum).abs().max()))
