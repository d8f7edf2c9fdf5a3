"""A loss under question: what is known of it so far, and how a derivative of it is tried."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcmlo.probing.agreement import Vector
from funcmlo.probing.case import Case
from funcmlo.probing.outcome import Outcome
from funcmlo.probing.remedies import Fault, fault_of
from funcmlo.probing.watching import Watch, watched

Way = Callable[[Case, Vector, Vector], Any]


class Interview:
    """What is known of a loss.

    Attributes:
        case: the loss as it came.
        wide: the case in which numbers are compared, in float64 where the loss can.
        epsilon: the precision in which that one computes.
        tour: what was heard when the loss was evaluated alone.
        has_gradient: whether a finite gradient came.
        draws: whether it draws from torch's default generator.
        found: the answers so far.
    """

    def __init__(self, case: Case) -> None:
        self.case = self.wide = case
        self.epsilon = precision([t for part in case.point() for t in part])
        self.tour = Watch()
        self.has_gradient = False
        self.draws = False
        self.found: dict[str, Outcome] = {}

    def say(self, name: str, ok: bool | None, fault: Fault | None = None, number: float | None = None) -> None:
        """Answer a question."""
        fault = fault or Fault("")
        self.found[name] = Outcome(name, ok, fault.operation, fault.message or None, fault.remedy, number)

    def works(self, name: str) -> bool:
        """Say whether a question was answered with yes."""
        return name in self.found and self.found[name].ok is True

    def narrow(self) -> None:
        """Compare numbers in the user's dtype from now on."""
        self.wide, self.epsilon = self.case, precision([t for part in self.case.point() for t in part])

    def attempt(self, name: str, kind: str, way: Way) -> tuple[Any, Vector] | None:
        """Take a derivative in the user's dtype, and in the one that is compared.

        Args:
            name: the question, which is answered.
            kind: its kind, for remedies.
            way: the derivative, of a case and a point: parts by the parameters and by the inputs.

        Returns:
            What came in the user's dtype, and all tensors of what is compared; None where something raised, or is not
            finite.
        """
        try:
            came = way(self.case, *self.case.point())
        except Exception as error:
            seen, _, _ = watched(lambda: way(self.case, *self.case.point()))
            self.say(name, False, fault_of(error, kind, seen, self.tour))
            return None
        own = joined(came)
        if not all(bool(torch.isfinite(t).all()) for t in own):
            self.say(name, False, self._not_finite(kind, way))
            return None
        wide = own
        if self.wide is not self.case:
            try:
                wide = joined(way(self.wide, *self.wide.point()))
            except Exception:  # what holds for the user's dtype counts
                self.narrow()
        self.say(name, True)
        return came, wide

    def _not_finite(self, kind: str, way: Way) -> Fault:
        """Find the operation whose derivative is not finite."""

        def anomalous() -> Any:
            with torch.autograd.detect_anomaly(check_nan=True):
                return way(self.case, *self.case.point())

        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            seen, _, error = watched(anomalous)
        # What is differentiated is a derivative already; the node that made it is the one that the user called.
        made = next((m for w in heard if (m := re.search(r"induced by (\w+?Backward\d*)", str(w.message)))), None)
        if error is not None and made is not None:
            error = RuntimeError(f"Function '{made[1]}' returned nan")
        found = None if error is None else fault_of(error, kind, seen, self.tour)
        remedy = (
            "keep away from the singular point: (x.square().sum() + 1e-12).sqrt() in place of a norm or a root at zero; "
            "with torch.where, put a harmless number into the operation too"
        )
        return Fault("not finite (NaN or infinite) at these parameters", found.operation if found else None, remedy)


def precision(tensors: Vector) -> float:
    """Return the machine epsilon of the least precise of some tensors."""
    return max(float(torch.finfo(t.dtype).eps) for t in tensors)


def joined(parts: Any) -> list[Tensor]:
    """Return the tensors of what belongs to the parameters and to the inputs, in one list."""
    return [t.detach() for part in parts[:2] for t in part]


def unsettled(what: str) -> Fault:
    """Say that differences could not tell."""
    return Fault(f"differences do not settle for {what}: a kink, a large curvature or too little precision")
