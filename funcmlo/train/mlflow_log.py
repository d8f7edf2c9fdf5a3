"""A run's rows for MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funcmlo.state import State
from funcmlo.train.callbacks import Callback, Start, check_every, check_package

_LONGEST = 500


class MLflowLogger(Callback):
    """Writes the rows as MLflow's metrics, into a folder or to a server; needs the package `mlflow` or `mlflow-skinny`.

    Args:
        where: a folder, or a tracking URI such as `"http://localhost:5000"` or `"sqlite:///mlflow.db"`.
        experiment: the experiment's name.
        every: outer steps between two rows.
        run_name: the run's name; None lets MLflow choose one.

    Raises:
        DefinitionError: the package is absent, or every is no positive integer.

    References:
        mlflow.org/docs/latest/python_api/mlflow.client.html.
    """

    def __init__(
        self,
        where: str | os.PathLike[str] = "mlruns",
        experiment: str = "funcmlo",
        *,
        every: int = 1,
        run_name: str | None = None,
    ) -> None:
        check_package("MLflowLogger", "mlflow", "mlflow-skinny")
        self.where, self.experiment, self.run_name = os.fspath(where), experiment, run_name
        self.every = check_every("MLflowLogger", every)
        self._client: Any = None
        self._run = ""

    def begin(self, start: Start) -> None:
        """Begin a run there, with the program as its parameters."""
        from mlflow.tracking import MlflowClient

        uri = self.where
        if "://" not in uri and uri != "databricks":
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # without which MLflow 3 refuses plain folders
            uri = Path(uri).resolve().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(self.experiment)
        number = self._client.create_experiment(self.experiment) if known is None else known.experiment_id
        self._run = self._client.create_run(number, run_name=self.run_name).info.run_id
        told = {"program": start.program, "seed": start.seed, "begun": start.begun, "steps": start.steps}
        for name, value in {**told, **{f"level {name}": text for name, text in start.settings.items()}}.items():
            self._client.log_param(self._run, name, str(value)[:_LONGEST])

    def record(self, step: int, row: Mapping[str, float], state: State) -> None:
        """Write a row."""
        if step % self.every:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in row.items()])

    def end(self, state: State, error: BaseException | None) -> None:
        """End the run there, as failed if it did."""
        if not self._run:
            return
        if error is not None:
            self._client.set_tag(self._run, "error", f"{type(error).__name__}: {error}"[:_LONGEST])
        self._client.set_terminated(self._run, status="FINISHED" if error is None else "FAILED")
        self._run = ""
