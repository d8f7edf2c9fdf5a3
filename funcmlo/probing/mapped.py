"""Does `torch.func.vmap` of a loss's derivatives give what a loop gives?"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from funcmlo.probing import agreement
from funcmlo.probing.agreement import Vector
from funcmlo.probing.case import Pair
from funcmlo.probing.interview import Interview, joined, precision
from funcmlo.probing.remedies import LOOP, Fault, fault_of, remedy_for
from funcmlo.probing.watching import watched

_COPIES = 2
_SLOW = re.compile(r"not yet implemented the batching rule for ([\w:.]+\w)")

Way = Callable[[Vector, Vector], Pair]


def maps(interview: Interview) -> None:
    """Ask about maps over the parameters and over the inputs, of the gradient and of Hessian-vector products.

    Args:
        interview: the loss.
    """
    case = interview.case
    if not interview.works("func_grad"):
        return
    y, x = case.point()
    v = agreement.direction(y)
    ways: dict[str, Way] = {"grad": case.func_grad}
    if interview.works("func_grad_of_grad"):
        ways["hvp"] = lambda y, x: case.func_hvp(y, x, v)
    elif interview.works("jvp_of_grad"):
        ways["hvp"] = lambda y, x: case.jvp(y, x, v)
    for of, way in ways.items():
        _asked(interview, f"vmap_of_{of}", way, (_several(y), x), (0, None))
        if x:
            _asked(interview, f"vmap_inputs_of_{of}", way, (y, _several(x)), (None, 0))


def _asked(interview: Interview, name: str, way: Way, arguments: Pair, over: tuple[int | None, int | None]) -> None:
    def mapped(randomness: str) -> Vector:
        return joined(torch.func.vmap(way, over, randomness=randomness)(*arguments))

    def sliced(i: int) -> Vector:
        return joined(way(*([t[i] for t in a] if o == 0 else a for a, o in zip(arguments, over, strict=True))))

    remark: Fault | None = None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            got = mapped("error")
        except Exception as error:
            seen, _, _ = watched(lambda: mapped("error"))
            fault = fault_of(error, "map", seen, interview.tour)
            if "randomness" not in str(error):
                interview.say(name, False, fault)
                return
            remark = replace(fault, message="draws random numbers", remedy=remedy_for("randomness", ""))
            try:
                got = mapped("same")
            except Exception as again:
                seen, _, _ = watched(lambda: mapped("same"))
                interview.say(name, False, fault_of(again, "map", seen, interview.tour))
                return
    slow = list(dict.fromkeys(m[1] for w in heard if (m := _SLOW.search(str(w.message)))))
    if slow and remark is None:
        known = next((k for k in interview.tour.kernels.values() if k[2] == slow[0].rsplit(".", 1)[0]), None)
        remark = Fault("as slow as a loop: no batching rule", f"{known[0]} ({slow[0]})" if known else slow[0])
    gap = max(agreement.apart([g[i] for g in got], sliced(i)) for i in range(_COPIES))
    comparable = not interview.draws and interview.works("deterministic")
    # Batched kernels add in another order, and Hessian-vector products cancel: half the digits.
    if comparable and not gap <= precision(got) ** 0.5:
        interview.say(name, False, Fault("mapped results differ from a loop's, without an error", None, LOOP), gap)
    else:
        interview.say(name, True, remark, gap if comparable else None)


def _several(vector: Vector) -> Vector:
    """A few points beside each other, not all the same."""
    return [torch.stack([t * (1 + i / 64) for i in range(_COPIES)]) for t in vector]
