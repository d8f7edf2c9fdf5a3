"""A run's rows for Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from funcmlo.state import State
from funcmlo.train.callbacks import Callback, Start, check_every, check_package


class WandbLogger(Callback):
    """Writes the rows for Weights & Biases, offline unless told otherwise; needs the package `wandb`.

    `wandb sync FOLDER` takes an offline run to the server later.

    Args:
        project: the project's name.
        mode: `"offline"`, `"online"` or `"disabled"`.
        every: outer steps between two rows.
        **options: what else `wandb.init` takes: `name`, `group`, `dir`, `tags`, `id` (with which a run goes on), …

    Raises:
        DefinitionError: the package is absent, or every is no positive integer.

    References:
        docs.wandb.ai/ref/python/init.
    """

    def __init__(self, project: str, *, mode: str = "offline", every: int = 1, **options: Any) -> None:
        check_package("WandbLogger", "wandb", "wandb")
        self.project, self.mode, self.options = project, mode, options
        self.every = check_every("WandbLogger", every)
        self._run: Any = None

    def begin(self, start: Start) -> None:
        """Begin a run there, with the program as its configuration."""
        import wandb

        config = {"program": start.program, "seed": start.seed, "steps": start.steps, "levels": dict(start.settings)}
        options = {"resume": "allow", **self.options} if "id" in self.options else self.options
        self._run = wandb.init(project=self.project, mode=self.mode, config=config, **options)  # type: ignore[arg-type]

    def record(self, step: int, row: Mapping[str, float], state: State) -> None:
        """Write a row."""
        if not step % self.every:
            self._run.log(dict(row), step=step)

    def end(self, state: State, error: BaseException | None) -> None:
        """End the run there, as failed if it did."""
        if self._run is None:
            return
        if error is not None:
            self._run.summary["error"] = f"{type(error).__name__}: {error}"
        self._run.finish(exit_code=0 if error is None else 1)
