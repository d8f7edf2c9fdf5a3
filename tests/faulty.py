"""Estimators with one fault each, as they have been seen or could be written, and the check that must name it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import ravel, unravel

Products = dict[str, Any]


def hvp(solved: fm.Solved, u: Any, at: Any = None, draw: int | None = None) -> Any:
    y = solved.params if at is None else at
    slope = torch.func.grad(lambda y: solved.loss(y, solved.inputs, draw=draw))
    return torch.func.vjp(slope, y)[1](u)[0]


def cross(solved: fm.Solved, w: Any, at: Any = None) -> Products:
    y = solved.params if at is None else at
    _, back = torch.func.vjp(lambda x: torch.func.grad(lambda y: solved.loss(y, x))(y), solved.inputs)
    return _tree.negative(back(w)[0])


@dataclass(frozen=True)
class CG(fm.BestResponse):
    """A right estimator in twenty lines, whose parts the faulty ones replace."""

    iterations: int = 20
    damping: float = 0.0

    claims: ClassVar = fm.Claims(knob="iterations", vmap=False)

    def product(self, solved: fm.Solved, u: Any) -> Any:
        return _tree.add_scaled(hvp(solved, u), self.damping, u)

    def solve(self, solved: fm.Solved, v: Any) -> tuple[Any, float]:
        w, r = _tree.zeros_like(v), v
        p, size, start = r, _tree.dot(r, r).detach(), float(_tree.norm(v).detach()) or 1.0
        for _ in range(self.iterations):
            if float(size) <= (1e-14 * start) ** 2:
                break
            h = self.product(solved, p)
            alpha = size / _tree.dot(p, h)
            w, r = _tree.add_scaled(w, alpha, p), _tree.add_scaled(r, -alpha, h)
            p, size = self.turn(r, p, size)
        return w, float(_tree.norm(r)) / start

    def turn(self, r: Any, p: Any, size: Tensor) -> tuple[Any, Tensor]:
        new = _tree.dot(r, r)
        return _tree.add_scaled(r, new / size, p), new

    def cross(self, solved: fm.Solved, w: Any) -> Products:
        return cross(solved, w)

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        w, residual = self.solve(solved, cotangent)
        return self.cross(solved, w), state, fm.Stats(hvps=self.iterations, residual=residual)


class WrongSign(CG):
    def cross(self, solved: fm.Solved, w: Any) -> Products:
        return _tree.negative(cross(solved, w))


class TransposedCross(CG):
    """The mixed derivative multiplied from the wrong side, where both spaces have one size."""

    def cross(self, solved: fm.Solved, w: Any) -> Products:
        x = solved.inputs["x"]
        if _tree.size(x) != _tree.size(w) or set(solved.inputs) != {"x"}:
            return cross(solved, w)
        _, along = torch.func.jvp(
            lambda at: ravel(torch.func.grad(lambda y: solved.loss(y, {"x": at}))(solved.params)),
            (x,),
            (_tree.map(lambda a, b: b.to(a.dtype), x, unravel(ravel(w), x)),),
        )
        return {"x": unravel(-along, x)}


class StaleResidual(CG):
    """β from the residual before last: directions are no longer conjugate."""

    def turn(self, r: Any, p: Any, size: Tensor) -> tuple[Any, Tensor]:
        return _tree.add_scaled(r, 0.5, p), _tree.dot(r, r)


class FrozenResidual(CG):
    """The residual that is told was never brought up to date after the first iteration's."""

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        w, residual = self.solve(solved, cotangent)
        return self.cross(solved, w), state, fm.Stats(hvps=self.iterations, residual=residual**3)


class ScaledOnOneSide(CG):
    """The system's matrix is scaled for safety, its right-hand side is not."""

    def product(self, solved: fm.Solved, u: Any) -> Any:
        return _tree.scale(0.1, hvp(solved, u))


class IterateBefore(CG):
    """Leaves its loop before the update that converged."""

    def solve(self, solved: fm.Solved, v: Any) -> tuple[Any, float]:
        w, r = _tree.zeros_like(v), v
        p, size, start = r, _tree.dot(r, r).detach(), float(_tree.norm(v).detach()) or 1.0
        for _ in range(self.iterations):
            h = self.product(solved, p)
            alpha = size / _tree.dot(p, h)
            r = _tree.add_scaled(r, -alpha, h)
            if not float(_tree.norm(r)) > 1e-10 * start:
                break
            w = _tree.add_scaled(w, alpha, p)
            p, size = self.turn(r, p, size)
        return w, float(_tree.norm(r)) / start


class DampedTwice(CG):
    def product(self, solved: fm.Solved, u: Any) -> Any:
        return _tree.add_scaled(super().product(solved, u), self.damping, u)


class DiagonalBlocks(CG):
    """Each parameter tensor's own block is inverted alone."""

    def product(self, solved: fm.Solved, u: Any) -> Any:
        leaves, structure = _tree.flatten(u)
        rows = []
        for i, leaf in enumerate(leaves):
            alone = [leaf if j == i else torch.zeros_like(other) for j, other in enumerate(leaves)]
            rows.append(_tree.leaves(hvp(solved, _tree.unflatten(structure, alone)))[i])
        return _tree.add_scaled(_tree.unflatten(structure, rows), self.damping, u)


class Cancelling(CG):
    """Hu as a difference of u and a gradient step on it."""

    def product(self, solved: fm.Solved, u: Any) -> Any:
        stepped = _tree.add_scaled(u, -0.1, super().product(solved, u))
        return _tree.scale(10.0, _tree.subtract(u, stepped))


class CrossAtTheStart(CG):
    def cross(self, solved: fm.Solved, w: Any) -> Products:
        return cross(solved, w, at=solved.init[0])


class Normalized(CG):
    """The cotangent is normalized, and its length forgotten."""

    def solve(self, solved: fm.Solved, v: Any) -> tuple[Any, float]:
        return super().solve(solved, _tree.scale(1 / (float(_tree.norm(v)) or 1.0), v))


class InPlace(CG):
    def solve(self, solved: fm.Solved, v: Any) -> tuple[Any, float]:
        found = super().solve(solved, v)
        for leaf in _tree.leaves(v):
            leaf.mul_(1.0)
        return found


class NaNToZero(CG):
    def cross(self, solved: fm.Solved, w: Any) -> Products:
        return _tree.map(torch.nan_to_num, cross(solved, w))


class GlobalDraws(CG):
    """Starts the solve where the global generator says."""

    def solve(self, solved: fm.Solved, v: Any) -> tuple[Any, float]:
        noise = _tree.map(lambda x: 1e-3 * torch.randn_like(x), v)
        return super().solve(solved, _tree.add(v, noise))


class SinglePrecision(CG):
    def cross(self, solved: fm.Solved, w: Any) -> Products:
        return _tree.map(torch.Tensor.float, cross(solved, w))


class FirstInputOnly(CG):
    def cross(self, solved: fm.Solved, w: Any) -> Products:
        return {"x": cross(solved, w)["x"]}


@dataclass(frozen=True)
class Remembering(CG):
    """Adds the last call's cotangent, as a warm start gone wrong."""

    def init(self, params: Any) -> Any:
        return _tree.zeros_like(params)

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        products, _, stats = super().vjp(solved, _tree.add(cotangent, state), state)
        return products, cotangent, stats


class Neumann(CG):
    """The series without its factor: a scale on one side."""

    claims: ClassVar = fm.Claims(knob="iterations", exact=False, vmap=False)
    rate: ClassVar = 0.5

    def solve(self, solved: fm.Solved, v: Any) -> tuple[Any, float]:
        total = term = v
        for _ in range(self.iterations):
            term = _tree.add_scaled(term, -self.rate, self.product(solved, term))
            total = _tree.add(total, term)
        return total, float(_tree.norm(term)) / (float(_tree.norm(v)) or 1.0)


@dataclass(frozen=True)
class Resampling(fm.BestResponse):
    """A difference of two gradients, each of its own batch."""

    claims: ClassVar = fm.Claims(target="identity", exact=False, knob="size", vmap=False)
    size: float = 1e-4

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        step = self.size / (float(_tree.norm(cotangent)) or 1.0)

        def slope(sign: float, draw: int | None) -> Products:
            y = _tree.add_scaled(solved.params, sign * step, cotangent)
            return torch.func.grad(lambda x: solved.loss(y, x, draw=draw))(solved.inputs)

        above, below = slope(1.0, None), slope(-1.0, 0)
        return _tree.scale(-0.5 / step, _tree.subtract(above, below)), state, fm.Stats(gradients=2)


@dataclass(frozen=True)
class Unroll(fm.BestResponse):
    """A right unrolled derivative by plain autograd."""

    requires: ClassVar = "replay"
    claims: ClassVar = fm.Claims(target="unrolled", assumes=frozenset())

    def steps(self, solved: fm.Solved) -> range:
        return range(solved.steps)

    def carried(self, solved: fm.Solved, opt_state: Any, inputs: Products) -> Any:
        return opt_state

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        def loop(inputs: Products) -> Any:
            y, s = solved.start(inputs)
            for t in self.steps(solved):
                y, s = solved.update(y, self.carried(solved, s, inputs), inputs, t)
            return y

        _, back = torch.func.vjp(loop, solved.inputs)
        return dict(back(cotangent)[0]), state, fm.Stats(steps=solved.steps)


class OffByOne(Unroll):
    def steps(self, solved: fm.Solved) -> range:
        return range(solved.steps - 1)


class DroppedState(Unroll):
    """The derivative runs through the parameters alone."""

    def carried(self, solved: fm.Solved, opt_state: Any, inputs: Products) -> Any:
        def cut(x: Any) -> Any:
            return torch.func.stop_gradient(x) if hasattr(torch.func, "stop_gradient") else _Cut.apply(x)

        return _tree.map_tensors(cut, opt_state)


class FirstBatchAlways(Unroll):
    """Every step is made as the first."""

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        return super().vjp(replace(solved, update=lambda y, s, x, t=None: solved.update(y, s, x, 0)), cotangent, state)


class FrozenOptimizer(Unroll):
    """The optimizer is taken at the inputs' values."""

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        def update(y: Any, s: Any, x: Products, t: int | None = None) -> Any:
            slope = torch.func.grad(lambda at: solved.parts.cost(at, x, t))(y)
            moved, s = solved.parts.updates(y, s, solved.inputs, slope, t)
            excess = solved.parts.excess(_tree.add(y, moved), x, t)
            return _tree.add(_tree.add(y, moved), _tree.zeros_like(y) if excess is None else excess), s

        return super().vjp(replace(solved, update=update), cotangent, state)


class NoProjection(Unroll):
    """Steps end before the projection."""

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        def update(y: Any, s: Any, x: Products, t: int | None = None) -> Any:
            slope = torch.func.grad(lambda at: solved.parts.cost(at, x, t))(y)
            moved, s = solved.parts.updates(y, s, x, slope, t)
            return _tree.add(y, moved), s

        return super().vjp(replace(solved, update=update), cotangent, state)


class ForgetsStart(Unroll):
    """The loop starts at the start's values."""

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        return super().vjp(replace(solved, start=lambda x: solved.init), cotangent, state)


class OneOfManyDropped(Unroll):
    """The last step is dropped where there are many."""

    def steps(self, solved: fm.Solved) -> range:
        return range(solved.steps - (solved.steps > 10))


class SwappedInputs(CG):
    """Products in the order of inputs, reversed where their shapes allow it."""

    def cross(self, solved: fm.Solved, w: Any) -> Products:
        products = cross(solved, w)
        names = list(products)
        same = len({_tree.structure(x) for x in products.values()}) == 1 and set(names) == {"x", "z"}
        return {name: products[other] for name, other in zip(names, reversed(names), strict=True)} if same else products


class Flushes(CG):
    """Small cotangents count as zero."""

    def solve(self, solved: fm.Solved, v: Any) -> tuple[Any, float]:
        return super().solve(solved, _tree.map(lambda x: torch.where(x.abs() < 1e-9, 0.0, x).to(x.dtype), v))


class SwitchesGradOff(CG):
    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        found = super().vjp(solved, cotangent, state)
        torch.set_grad_enabled(False)
        return found


class OtherSignInSingle(CG):
    def cross(self, solved: fm.Solved, w: Any) -> Products:
        return _tree.map(lambda x: -x if x.dtype == torch.float32 else x, cross(solved, w))


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.zeros_like(g)


@dataclass(frozen=True)
class Samples(fm.BestResponse):
    """(FG)²U by hand: a mean over directions r of ⟨v, Jr⟩ r."""

    samples: int = 4

    requires: ClassVar = "replay"
    claims: ClassVar = fm.Claims(target="unrolled", exact=False, stochastic=True, knob="samples", assumes=frozenset())

    def weight(self) -> float:
        return 1.0 / self.samples

    def generator(self, solved: fm.Solved) -> torch.Generator:
        return torch.Generator().manual_seed(solved.seed % 2**60)

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        generator = self.generator(solved)
        exact, _, _ = Unroll().vjp(solved, cotangent, None)  # ⟨v, Jr⟩ = ⟨Jᵀv, r⟩
        total = _tree.zeros_like(exact)
        for _ in range(self.samples):
            r = _tree.map(lambda x: torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1, solved.inputs)
            total = _tree.add_scaled(total, self.weight() * _tree.dot(exact, r), r)
        return total, state, fm.Stats(steps=self.samples * solved.steps)


class Summed(Samples):
    def weight(self) -> float:
        return 1.0


class OneLess(Samples):
    """A mean over b − 1."""

    def weight(self) -> float:
        return 1.0 / max(1, self.samples - 1)


class OneDirection(Samples):
    """One direction for all samples of a call."""

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        return Samples(1).vjp(solved, cotangent, state)


class SameDraws(Samples):
    def generator(self, solved: fm.Solved) -> torch.Generator:
        return torch.Generator().manual_seed(0)


def without_direct(program: fm.Multilevel, state: fm.State, batches: Any, *, of: str) -> Any:
    """The hypergradient without the upper cost's own gradient, for a cost whose slope by x does not depend on y."""
    level = next(level for level in program.levels if level.name == of)
    direct = torch.func.grad(lambda own: level.cost(own, state.params, None))(state.params[of])
    return _tree.subtract(program.hypergradient(state, batches, of=of), direct)


def first_path_twice(program: fm.Multilevel, state: fm.State, batches: Any, *, of: str) -> Any:
    """A sum over the paths' ends in which the first end is counted a second time."""
    *lower, top = program.levels
    whole = program.hypergradient(state, batches, of=of)
    ends = [name for name in top.reads_levels if len(program.graph.paths(of)) > 1]
    if not ends:
        return whole

    def alone(x: Any, end: Any) -> Tensor:
        values = {name: torch.zeros_like(state.params[name]) for name in top.reads_levels} | {ends[0]: end}
        return top.cost(x, values, None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)  # the other ends are read by no one now
        again = fm.Multilevel(*lower, fm.Level(of, alone, top.optimizer, reads={"end": ends[0]}))
    return _tree.add(whole, without_direct(again, state, batches, of=of))


RIGHT: dict[str, Callable[[], fm.BestResponse]] = {
    "cg": CG,
    "damped": lambda: CG(damping=0.1),
    "unroll": Unroll,
    "samples": Samples,
}

FAULTS: dict[str, tuple[Callable[[], fm.BestResponse], str]] = {
    "a wrong sign": (WrongSign, "sign"),
    "a transposed cross term": (TransposedCross, "transposed_cross_term"),
    "a stale residual": (StaleResidual, "inverse_hessian"),
    "a residual that is not brought up to date": (FrozenResidual, "reported_residual"),
    "a scale on one side of the system": (ScaledOnOneSide, "scale"),
    "a series without its factor": (Neumann, "scale"),
    "the iterate before the converged one": (IterateBefore, "converged_iterate"),
    "a damping applied twice": (DampedTwice, "damping"),
    "diagonal blocks alone": (DiagonalBlocks, "coupled_blocks"),
    "products that cancel in float32": (Cancelling, "cancels_in_float32"),
    "a cross term at the start": (CrossAtTheStart, "cross_term_at_the_start"),
    "an off-by-one in the unroll": (OffByOne, "steps_counted"),
    "a dropped optimizer state": (DroppedState, "optimizer_state"),
    "a sample not averaged": (Summed, "samples_not_averaged"),
    "a mean over one sample less": (OneLess, "few_samples_biased"),
    "one direction for all samples": (OneDirection, "samples_alike"),
    "every step on the first batch": (FirstBatchAlways, "batch_of_another_step"),
    "a learning rate taken as a constant": (FrozenOptimizer, "learning_rate_missing"),
    "a projection left out": (NoProjection, "projection_missing"),
    "a start without a derivative": (ForgetsStart, "start_missing"),
    "a step dropped of many": (OneOfManyDropped, "steps_counted"),
    "inputs confused": (SwappedInputs, "inputs_confused"),
    "small cotangents flushed": (Flushes, "linear_in_the_cotangent"),
    "grad mode left off": (SwitchesGradOff, "global_settings_changed"),
    "another sign in float32": (OtherSignInSingle, "dtypes"),
    "the same draws at every step": (SameDraws, "draws_repeated"),
    "a cotangent not linear": (Normalized, "linear_in_the_cotangent"),
    "an input changed in place": (InPlace, "changed_in_place"),
    "a batch resampled between two evaluations": (Resampling, "batch_resampled"),
    "NaN turned into zero": (NaNToZero, "nan_hidden"),
    "draws from the global generator": (GlobalDraws, "repeatable"),
    "the global generator moved": (GlobalDraws, "global_random_state"),
    "another dtype": (SinglePrecision, "dtypes"),
    "an input left out": (FirstInputOnly, "several_inputs"),
    "a state that leaks": (Remembering, "state_carried"),
}

COMPOSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a missing direct gradient": (without_direct, "direct_gradient_missing"),
    "a path counted twice": (first_path_twice, "path_counted_twice"),
}
