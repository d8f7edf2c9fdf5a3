"""The questions that `probe` asks of a loss, in their order: later ones build on what earlier ones found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from funcmlo.errors import listing
from funcmlo.probing import agreement
from funcmlo.probing.agreement import Agreement, Vector
from funcmlo.probing.case import Case, NotACost, Pair
from funcmlo.probing.interview import Interview, joined, precision, unsettled
from funcmlo.probing.mapped import maps
from funcmlo.probing.outcome import Outcome
from funcmlo.probing.remedies import Fault, fault_of, remedy_for, silent
from funcmlo.probing.watching import Watch, watched

NAMES = (
    "value",
    "unchanged",
    "deterministic",
    "float64",
    "grad",
    "consistent",
    "func_grad",
    "grad_of_grad",
    "func_grad_of_grad",
    "jvp_of_grad",
    "vmap_of_grad",
    "vmap_of_hvp",
    "vmap_inputs_of_grad",
    "vmap_inputs_of_hvp",
)


def answers(case: Case) -> tuple[Outcome, ...]:
    """Ask everything of a loss, and put back what it writes to.

    Args:
        case: the loss with its arguments.

    Returns:
        One answer for each of `NAMES`.
    """
    interview = Interview(case)
    steps: tuple[tuple[str, Callable[[Interview], None]], ...] = (
        ("value", _value),
        ("deterministic", _deterministic),
        ("float64", _float64),
        ("grad", _grad),
        ("consistent", _consistent),
        ("func_grad", _func_grad),
        ("grad_of_grad", _products),
        ("vmap_of_grad", maps),
    )
    for name, ask in steps:
        if name != "value" and not interview.works("value"):
            break
        try:
            ask(interview)
        except Exception as error:  # a loss that works only sometimes must not end the report
            interview.say(name, False, fault_of(error, "value", Watch(), interview.tour))
    interview.tour.restore()
    return tuple(interview.found.get(name, Outcome(name, None)) for name in NAMES)


def _value(interview: Interview) -> None:
    """Whether it is a cost, and whether it leaves alone what it is given; and listen to what it does."""
    before = _states()
    tour, value, error = _listen(interview.case, tracked=True)
    interview.draws = not all(map(torch.equal, before, _states()))
    interview.tour = tour
    if error is not None and "in-place" in str(error):
        # Autograd refuses to write to what it differentiates by; look again at what the loss means to do.
        interview.tour, _, _ = _listen(interview.case, tracked=False)
    _unchanged(interview)
    if isinstance(error, NotACost):
        interview.say("value", False, error.fault)
    elif error is not None:
        interview.say("value", False, fault_of(error, "value", tour, tour))
    elif not bool(torch.isfinite(value)):
        interview.say("value", False, Fault(f"the cost is {float(value)}", None, "look at the parameters and the batch"))
    else:
        interview.say("value", True)


def _states() -> list[torch.Tensor]:
    """The states of torch's default generators."""
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if initialized else [])]


def _listen(case: Case, *, tracked: bool) -> tuple[Watch, Any, Exception | None]:
    y, x = case.point()
    given = case.arguments([t.requires_grad_(tracked) for t in y], x)
    watch, value, error = watched(lambda: case.evaluated(given, seed=False))
    if value is not None:
        watch.walk(value)
        value = value.detach()
    params, inputs, batch = given
    named = {f"the input {name}": tree for name, tree in inputs.items()}
    watch.settle({"the parameters": params, **named, "the batch": batch})
    return watch, value, error


def _unchanged(interview: Interview) -> None:
    written = interview.tour.written
    if not written:
        interview.say("unchanged", True)
        return
    whats, operations = (list(dict.fromkeys(part)) for part in zip(*written, strict=True))
    operation = listing(o for o in operations if o) if any(operations) else None
    fault = Fault(f"{listing(whats)} changed in place", operation, remedy_for(f"in-place {operation} running", ""))
    interview.say("unchanged", False, fault)


def _deterministic(interview: Interview) -> None:
    """Whether the same seed gives the same bits."""
    first, second = (interview.case.number(*interview.case.point()) for _ in range(2))
    if torch.equal(first, second):
        interview.say("deterministic", True)
        return
    number = agreement.apart([first], [second])
    if number < 1e3 * interview.epsilon:
        why = Fault(
            f"two evaluations differ by rounding ({number:.1g}): a kernel adds in no fixed order",
            None,
            "torch.use_deterministic_algorithms(True)",
        )
    else:
        why = Fault(
            "two evaluations under the same seed differ: the loss draws from a generator that torch.manual_seed does not "
            "set (its own, numpy's, Python's), or keeps a state",
            interview.tour.generator,
            "draw with torch and without generator=: funcmlo seeds torch's default generators for each step; or draw "
            "outside and hand the numbers in through the batch",
        )
    interview.say("deterministic", False, why, number)


def _float64(interview: Interview) -> None:
    """Whether it computes in float64, where its numbers are compared; one that does not is no failure, and is noted."""
    case = interview.case.double()
    y, x = case.point()
    given = case.arguments([t.requires_grad_() for t in y], x)
    watch, value, error = watched(lambda: case.evaluated(given))
    watch.settle({})
    watch.restore()
    if error is not None:
        fault = fault_of(error, "dtype", watch, interview.tour)
        interview.say("float64", None, replace(fault, message=f"in float64: {fault.message}"))
        return
    interview.wide = case
    narrowed = watch.narrowed or (None if value.dtype == torch.float64 else (value.dtype, None))
    interview.epsilon = torch.finfo(torch.float64 if narrowed is None else narrowed[0]).eps
    if narrowed is None:
        interview.say("float64", True)
        return
    message = f"part of it computes in {narrowed[0]}, so numbers are compared to {interview.epsilon ** (1 / 3):.1g} only"
    interview.say("float64", None, Fault(message, narrowed[1], "cast to the parameters' dtype: x.to(params.dtype)"))


def _grad(interview: Interview) -> None:
    """Whether there is a gradient."""
    names, _ = interview.case.names()
    got = interview.attempt("grad", "grad", Case.grad)
    if got is None:
        return
    interview.has_gradient = True
    own, _, used = got[0]
    unused = [name for name, u in zip(names, used[: len(names)], strict=True) if not u]
    if len(unused) == len(names):
        what = "the loss does not depend on its own parameters: its gradient is zero"
        interview.say("grad", False, silent(what, "grad", interview.tour))
    elif unused:
        interview.say("grad", True, Fault(f"no dependence on {listing(unused)}"))
    elif not any(bool(g.any()) for g in own):
        interview.say("grad", True, Fault("the gradient is exactly zero here"))


def _consistent(interview: Interview) -> None:
    """Whether the gradients by the parameters and by the inputs are the loss's derivatives."""
    if not interview.has_gradient:
        return
    if not interview.works("deterministic"):
        interview.say("consistent", None, Fault("not compared: the loss is not deterministic"))
        return
    case = interview.wide
    y, x = case.point()
    grads, start = joined(case.grad(y, x)), [*y, *x]
    wrong, open_ones, number = [], [], 0.0
    waiting = case.groups()
    while waiting:
        name, members = waiting.pop(0)

        def slope(at: Vector, members: list[int] = members) -> Vector:
            moved = list(start)
            for i, t in zip(members, at, strict=True):
                moved[i] = t
            return [case.number(moved[: len(y)], moved[len(y) :]).reshape(1)]

        at = [start[i] for i in members]
        along = agreement.direction(at)
        claimed = torch.stack([(grads[i] * v).sum().to(torch.float64) for i, v in zip(members, along, strict=True)]).sum()
        found = agreement.compare([claimed.reshape(1)], slope, at, along, interview.epsilon)
        number = max(number, found.number if found.settled else 0.0)
        if not found.ok and len(members) > 1:
            waiting = [(case.label(i), [i]) for i in members] + waiting
            wrong.append("")
        elif not found.ok:
            wrong.append(name)
        elif not found.settled:
            open_ones.append(name)
    if not wrong:
        interview.say("consistent", True, unsettled(listing(open_ones)) if open_ones else None, number)
        return
    fault = silent(f"the gradient by {_few(wrong)} is not the loss's derivative, without an error", "grad", interview.tour)
    meant = "if that is meant (a stopped gradient, a straight-through estimate), go on"
    remedy = f"{fault.remedy}; {meant}" if fault.remedy else meant
    interview.say("consistent", False, replace(fault, remedy=remedy), number)


def _func_grad(interview: Interview) -> None:
    """Whether `torch.func.grad` gives what plain autograd gives."""
    if not interview.works("grad"):
        return
    got = interview.attempt("func_grad", "func", Case.func_grad)
    if got is None or not interview.works("deterministic"):
        return
    case = interview.wide
    gap = agreement.apart(got[1], joined(case.grad(*case.point())))
    if gap <= interview.epsilon**0.5:
        interview.say("func_grad", True, None, gap)
    elif interview.draws:
        remark = Fault("draws other random numbers inside torch.func than outside, under the same seed")
        interview.say("func_grad", True, remark, gap)
    else:
        fault = silent("it differs from plain autograd's without an error", "func", interview.tour)
        interview.say("func_grad", False, fault, gap)


def _products(interview: Interview) -> None:
    """Whether there are Hessian-vector products, and whether they are the gradient's derivative."""
    if not interview.works("grad"):
        return
    _product(interview, "grad_of_grad", "second", Case.hvp, lambda case, y, x: case.grad(y, x))
    if interview.works("func_grad"):
        _product(interview, "func_grad_of_grad", "second", Case.func_hvp, Case.func_grad)
        kind = "forward" if interview.works("grad_of_grad") else "second"
        _product(interview, "jvp_of_grad", kind, Case.jvp, Case.func_grad)


def _product(
    interview: Interview,
    name: str,
    kind: str,
    way: Callable[[Case, Vector, Vector, Vector], Pair],
    gradient: Callable[[Case, Vector, Vector], Any],
) -> None:
    got = interview.attempt(name, kind, lambda case, y, x: way(case, y, x, agreement.direction(y)))
    if got is None:
        return
    if not interview.works("deterministic"):
        interview.say(name, True, Fault("not compared with differences: the loss is not deterministic"))
        return
    case = interview.wide
    y, x = case.point()
    along = agreement.direction(y)
    if case is not interview.case and not interview.draws:
        own, size = joined(got[0]), agreement.norm(joined(interview.case.grad(*interview.case.point())))
        gap = agreement.apart(own, got[1])
        far = agreement.norm([a - b for a, b in zip(own, got[1], strict=True)]) > precision(own) ** 0.5 * size
        if far and gap > 0.5:  # more than cancellation and rounding do
            what = f"in {own[0].dtype} it is not what it is in float64, without an error"
            interview.say(name, False, silent(what, kind, interview.tour), gap)
            return
    found = agreement.compare(got[1], lambda at: joined(gradient(case, at, x)), y, along, interview.epsilon)
    if found.ok and found.settled:
        interview.say(name, True, None, found.number)
    elif found.ok:
        interview.say(name, True, unsettled("the gradient"))
    else:
        interview.say(name, False, silent(_wrong(case, found), kind, interview.tour), found.number)


def _wrong(case: Case, found: Agreement) -> str:
    how = "zero" if found.zero else "wrong"
    where = _few([case.label(i) for i in found.worst])
    return f"the second derivative by {where} is {how}, without an error; differences of the gradient say otherwise"


def _few(names: list[str]) -> str:
    names = [name for name in names if name]
    return listing(names[:3]) + (" and others" if len(names) > 3 else "")
