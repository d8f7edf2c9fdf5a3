"""Is the product right? Each check is on a problem where one fault alone would show."""

from __future__ import annotations

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo.operators import ravel
from funcmlo.testing.by_hand import solved
from funcmlo.testing.checks.base import Check, any_level, check, exact, implicit, settled, sized
from funcmlo.testing.examined import STEPS, Answer, Examined, distance, unit
from funcmlo.testing.matrices import Matrices, cross, flat, normal, symmetric
from funcmlo.testing.outcome import Finding


def judged(examined: Examined, answer: Answer, expected: Tensor, condition: float, message: str) -> Finding:
    """Compare an answer with what was expected, to the accuracy that the estimator promises.

    A linear solve that stops at a residual r is off by up to condition · r; that r is true is another check.

    Args:
        examined: the estimator.
        answer: what it answered.
        expected: what it should have.
        condition: of H.
        message: for where it is off.

    Returns:
        The finding.
    """
    size = float(torch.linalg.vector_norm(expected)) or 1.0
    stopped = condition * answer.residual if answer.residual < 1e-2 else 0.0
    return Finding(distance(answer.value, expected), examined.accuracy + stopped + answer.noise / size, message)


@check(any_level)
def sign(examined: Examined) -> Finding:
    """On g = ¼y² − xy, Jv has the sign of v."""
    problem = Matrices(0.5 * torch.eye(1).double(), torch.eye(1).double())
    answer = examined.converged.answer(problem, torch.ones(1).double())
    value = float(answer.value)
    told = "−∇²_xy g carries a minus sign" if value < 0 else "expected a number above 0"
    return Finding(1.0 - float(answer.value.sign()), 0.5, f"the answer to 1 is {value:.3g}; {told}")


@check(any_level)
def transposed_cross_term(examined: Examined) -> Finding:
    """With H = I/2 the answer points along Bᵀv, and B is square and far from symmetric."""
    b = cross(3, 3, examined.seed)
    problem, v = Matrices(0.5 * torch.eye(3).double(), b), normal(flat(3), examined.seed + 1)
    answer = examined.converged.answer(problem, v)
    found = _away(answer.value, b.T @ v)
    other = _away(answer.value, b @ v)
    told = "; it points along ∇²_yx g v, the transpose" if other < 1e-3 < found else ""
    size = float(torch.linalg.vector_norm(answer.value)) or 1.0
    return Finding(found, examined.accuracy + answer.noise / size, f"the answer is off the line of −∇²_xy g v{told}")


@check(any_level, sized)
def scale(examined: Examined) -> Finding:
    """With H = I/2 the length of the answer is that of its target: 2 Bᵀv if H is inverted."""
    problem, v = Matrices(0.5 * torch.eye(3).double(), cross(3, 2, examined.seed)), normal(flat(3), examined.seed + 1)
    examined = examined.converged
    answer, expected = examined.answer(problem, v), examined.target(problem, v)
    size = float(torch.linalg.vector_norm(expected))
    ratio = float(torch.linalg.vector_norm(answer.value)) / size
    told = f"the answer is {ratio:.4g} times as long as it should be: a scale on one side only, or a sum for a mean?"
    return Finding(abs(ratio - 1.0), examined.accuracy + answer.noise / size + 2 * answer.residual, told)


@check(any_level, implicit)
def inverse_hessian(examined: Examined) -> Finding:
    """With B = I the answer is w, and Hw = v for an H of condition 10."""
    n = 12
    problem, v = Matrices(symmetric(n, 10.0, examined.seed), torch.eye(n).double()), normal(flat(n), examined.seed + 1)
    examined = examined.converged
    answer, expected = examined.answer(problem, v), examined.target(problem, v)
    told = "w should solve (H + λI)w = v"
    if distance(answer.value, v) < 1e-3 < distance(expected, v):
        told += "; it is v: H is taken to be the identity"
    return judged(examined, answer, expected, 10.0, told)


@check(any_level, implicit)
def converged_iterate(examined: Examined) -> Finding:
    """With H = I/2 and B = I an iterative solver is done after one step, and must not return the iterate before it."""
    problem, v = Matrices(0.5 * torch.eye(4).double(), torch.eye(4).double()), normal(flat(4), examined.seed)
    examined = examined.converged
    answer, expected = examined.answer(problem, v), examined.target(problem, v)
    told = "the iterate before the converged one came back" if float(answer.value.norm()) < 1e-6 else "w should be 2v"
    return judged(examined, answer, expected, 1.0, told)


@check(any_level, implicit)
def coupled_blocks(examined: Examined) -> Finding:
    """Two parameter tensors whose Hessian couples them strongly: H is inverted whole, not block by block."""
    eye = torch.eye(2).double()
    q = torch.linalg.qr(cross(2, 2, examined.seed))[0]
    a = torch.cat([torch.cat([eye, 0.8 * q], 1), torch.cat([0.8 * q.T, eye], 1)]) / 1.8
    space = {"first": flat(2), "second": flat(2)}
    problem, v = Matrices(a, cross(4, 3, examined.seed + 1), y_like=space), normal(space, examined.seed + 2)
    examined = examined.converged
    answer, expected = examined.answer(problem, v), examined.target(problem, v)
    blocks = torch.kron(eye, torch.ones(2, 2).double()) * a + examined.damping * torch.eye(4).double()
    by_block = problem.b.T @ torch.linalg.solve(blocks, ravel(v))
    told = "; it is that of H's diagonal blocks alone" if distance(answer.value, by_block) < 1e-3 else ""
    return judged(examined, answer, expected, 9.0, f"the answer is not that of the whole H{told}")


@check(any_level)
def several_inputs(examined: Examined) -> Finding:
    """The answer has every input, with zeros for one that the cost does not read."""
    problem, v = Matrices(symmetric(3, 3.0, examined.seed), cross(3, 2, examined.seed)), normal(flat(3), examined.seed)
    at = examined.at(problem)
    unread = {"x": at.inputs["x"], "z": {"a": torch.ones(2).double(), "b": [torch.ones(()).double()]}}
    seen = solved(problem.loss, at.init[0], unread, examined.estimator, steps=at.steps)
    products, _, _ = examined.estimator.vjp(seen, v, examined.estimator.init(seen.params))
    if not isinstance(products, dict) or set(products) != {"x", "z"}:
        came = list(products) if isinstance(products, dict) else type(products).__name__
        return Finding(float("inf"), 0.0, f"expected a dict with the inputs x and z; {came} came")
    if difference := _tree.mismatch(unread, products):
        return Finding(float("inf"), 0.0, f"an input and its cotangent differ: {difference}")
    if examined.sampled:  # along drawn directions every input moves: zero on average, and never alone
        return Finding(0.0, 0.0, "")
    return Finding(float(_tree.norm(products["z"])), 0.0, "the cotangent of an input that the cost does not read is not 0")


@check(any_level, settled)
def inputs_confused(examined: Examined) -> Finding:
    """Two inputs of one shape that are both read: each has its own product."""
    problem = Matrices(symmetric(3, 3.0, examined.seed), cross(3, 4, examined.seed))
    v, inputs = normal(flat(3), examined.seed), {"x": normal(flat(2), 1), "z": normal(flat(2), 2)}

    def loss(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return problem.loss(y, {"x": torch.cat([inputs["x"], inputs["z"]])})

    examined = examined.converged
    both = torch.cat(list(inputs.values()))
    start = normal(flat(3), 3) if examined.unrolled else problem.solution(both)
    at = solved(loss, start, inputs, examined.estimator, steps=STEPS)
    products, _, stats = examined.estimator.vjp(at, v, examined.estimator.init(at.params))
    answer, expected = torch.cat([products["x"], products["z"]]), examined.target(problem, v)
    if not examined.promises_size:
        answer, expected = unit(answer), unit(expected)
    return judged(examined, Answer(answer, 0.0, stats), expected, 3.0, "two inputs that are both read are confused")


@check(any_level, settled, exact)
def cancels_in_float32(examined: Examined) -> Finding:
    """A cost of size 1e-5 in float32: the answer keeps float32's digits, and nothing larger is subtracted on the way."""
    small, single = 1e-5, torch.float32
    a, b = small * symmetric(3, 3.0, examined.seed), small * cross(3, 2, examined.seed)
    problem = Matrices(a, b, y_like=torch.zeros(3, dtype=single), x_like=torch.zeros(2, dtype=single))
    v = normal(problem.params_space, examined.seed + 1)
    examined = examined.converged
    answer, expected = examined.answer(problem, v), examined.target(problem, v)
    # float32's ε of 1.2e-7 times the condition and some hundred operations, with a factor of ten to spare
    told = "digits are lost: is a small product formed as the difference of two large ones?"
    found = judged(examined, answer, expected, 3.0, told)
    return Finding(found.error, max(found.allowed, 1e-3), told)


@check(any_level, settled)
def linear_in_the_cotangent(examined: Examined) -> Finding:
    """L(u − 3v) = L(u) − 3 L(v), and L(cu) = c L(u), for c = 10¹² and 10⁻¹² too."""
    problem = Matrices(symmetric(4, 10.0, examined.seed), cross(4, 3, examined.seed))
    u, v = (normal(flat(4), examined.seed + i) for i in range(2))
    examined = examined.converged
    parts, both, large = (examined.answer(problem, w) for w in (u, u - 3 * v, 1000 * u))
    rest = examined.answer(problem, v)
    residual = max(a.residual for a in (parts, both, large, rest))
    allowed = 4 * (examined.accuracy + (10.0 * residual if residual < 1e-2 else 0.0))
    size = float(parts.value.norm() + 3 * rest.value.norm()) or 1.0
    added = float((both.value - parts.value + 3 * rest.value).norm()) / size
    scaled = float((large.value / 1000 - parts.value).norm()) / size
    for c in (1e-12, 1e12):
        scaled = max(scaled, float((examined.answer(problem, c * u).value / c - parts.value).norm()) / size)
    what = "L(u − 3v) is not L(u) − 3 L(v)" if added >= scaled else "L(cu) is not c L(u) for c = 1000, 1e12 and 1e-12"
    return Finding(max(added, scaled), allowed, f"{what}: is the cotangent normalized, clipped or squared somewhere?")


def _away(answer: Tensor, line: Tensor) -> float:
    """The sine of the angle between a vector and a line; 1 for a zero vector."""
    size = float(answer.norm())
    if not size:
        return 1.0
    rest = answer - line * (answer @ line) / (line @ line)
    return float(rest.norm()) / size


CHECKS: tuple[Check, ...] = (
    sign,
    transposed_cross_term,
    scale,
    inverse_hessian,
    converged_iterate,
    coupled_blocks,
    several_inputs,
    inputs_confused,
    cancels_in_float32,
    linear_in_the_cotangent,
)
