"""Parameters that are sharded over processes (DTensor): what torch cannot do with them is told by name."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

from funcmlo.describe import compact
from funcmlo.errors import EstimatorError

_OPERATION = re.compile(r"aten\.[\w.]+")


@contextmanager
def naming(owner: str, response: object) -> Generator[None]:
    """Run an estimator and say what to do where sharded tensors do not have what it needs.

    Args:
        owner: whose response it is, for the message.
        response: the estimator.

    Yields:
        Nothing.

    Raises:
        EstimatorError: torch has no rule for an operation on sharded tensors.
        RuntimeError: what else the estimator raised.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if "sharding strategy" not in str(error) and "DTensor" not in str(error):
            raise
        found = _OPERATION.search(str(error))
        raise EstimatorError(
            f"{owner}: {compact(response)} needs {found[0] if found else 'something'} of sharded parameters (DTensor), for "
            "which torch has no rule; use ITD(), AID(CG(…)), SAMA() or FiniteDifference(), or whole parameters."
        ) from error
