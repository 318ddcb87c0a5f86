"""`tracker=mlflow`: a run in MLflow, on the server of MLFLOW_TRACKING_URI or in the run directory.

Without MLFLOW_TRACKING_URI the run is kept in `tracker/mlflow/` of the run directory, as a store of files,
which needs no server and no database. `mlflow migrate-filestore` puts such a store into a database.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allranks.trackers.packages import kept_id, require, without_epoch
from allranks.trackers.protocol import Position, TrackedRun

# Limits of MLflow's REST interface for one call.
_MOST_METRICS = 1000
_MOST_PARAMETERS = 100
_LONGEST_VALUE = 6000
# By itself MLflow tries to reach a server for minutes. That is not needed here, because a tracker that
# fails is tried again after the next epoch. The timeout is in seconds.
_REQUEST_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class MLflow:
    """Metrics for each step and epoch, the configuration as parameters, the pictures as artifacts."""

    def __init__(self, experiment: str = "allranks") -> None:
        require("mlflow", "mlflow")
        self._experiment = experiment
        self._client: Any = None
        self._id = ""
        self._has: dict[str, int] = {}  # the last step that MLflow has of each metric
        self._logged_ms: dict[str, int] = {}  # when the newest value of each metric was logged
        self._epochs_ms: dict[int, int] = {}  # when each epoch was logged, by its number
        self._now_ms = 0  # when this process has logged something for the last time

    def open(self, run: TrackedRun) -> Position | None:
        """Makes the run, or finds it; returns how far MLflow has it."""
        for name, value in _REQUEST_LIMITS.items():
            os.environ.setdefault(name, value)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run.folder / "mlflow").absolute().as_uri()
            # Without this MLflow 3 refuses its own stores of files, and asks for a database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        # If the server is down, the follower warns of it once. urllib3 would warn at each try as well.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        self._client = MlflowClient(tracking_uri=uri)
        self._id, is_new = kept_id(run.folder / "mlflow-run", lambda: self._make(run.name))
        if not is_new:
            self._client.update_run(self._id, status="RUNNING")
        known = self._client.get_run(self._id).data
        self._describe(run, known.params)

        histories = {key: self._client.get_metric_history(self._id, key) for key in known.metrics}
        self._has = {key: max(each.step for each in values) for key, values in histories.items()}
        self._logged_ms = {key: max(each.timestamp for each in values) for key, values in histories.items()}
        self._epochs_ms = {int(each.value): each.timestamp for each in histories.get("epoch", [])}
        self._now_ms = max(self._logged_ms.values(), default=0)
        steps = [step for key, step in self._has.items() if key.startswith("step/")]
        # A process that was killed may have handed over only some of the figures of its last step or epoch.
        # So the position is one step and one epoch earlier. These figures come again, and those that MLflow
        # has already are left out.
        return Position(max(0, min(steps, default=0) - 1), max(0, max(self._epochs_ms, default=0) - 1))

    def steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Metrics of single steps."""
        self._log([self._beyond_known(without_epoch(record)) for record in records])

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of an epoch, at its last step."""
        # Several epochs may have the same last step, because a loop of the user's own may count no steps.
        # So the step does not tell whether MLflow has a figure of this epoch already, but the time does:
        # the number of an epoch is logged first, and whatever is logged after that moment belongs to this
        # epoch.
        begun_ms = self._epochs_ms.get(metrics["epoch"])
        if begun_ms is not None:
            missing = {
                key: value for key, value in metrics.items() if self._logged_ms.get(key, -1) < begun_ms
            }
            self._log([{**missing, "step": metrics["step"]}])
            return
        self._log([{"epoch": metrics["epoch"], **metrics}])
        self._epochs_ms[metrics["epoch"]] = self._now_ms

    def summary(self, values: Mapping[str, Any]) -> None:
        """The figures of the test as metrics, and the whole summary as an artifact."""
        step = max(self._has.values(), default=0)
        test = {key: value for key, value in values.items() if key.startswith("test/")}
        self._log([self._beyond_known({"step": step, **test})])
        self._client.log_dict(self._id, dict(values), "summary.json")

    def pictures(self, paths: Sequence[Path]) -> None:
        """Each picture as an artifact."""
        for path in paths:
            self._client.log_artifact(self._id, str(path), "pictures")

    def close(self, finished: bool) -> None:
        """Tells MLflow that the run is finished, or that a later start may go on with it."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "SCHEDULED")

    # --- tools ----------------------------------------------------------------------------------------

    def _make(self, name: str) -> str:
        """A new run in the experiment; returns its id."""
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        return str(self._client.create_run(experiment, run_name=name).info.run_id)

    def _describe(self, run: TrackedRun, known: Mapping[str, str]) -> None:
        """Logs the environment, and the parameters that MLflow does not know yet.

        An earlier call may have failed between the two, or between two batches of parameters. The
        parameters come last, so a run that has all of them has its environment, too.
        """
        from mlflow.entities import Param

        values = [
            Param(key, str(value)[:_LONGEST_VALUE]) for key, value in run.config.items() if key not in known
        ]
        if values:
            self._client.log_dict(self._id, dict(run.environment), "environment.json")
        for begin in range(0, len(values), _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=values[begin : begin + _MOST_PARAMETERS])

    def _beyond_known(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The figures of a record whose step is beyond the last one that MLflow has of them."""
        step = record["step"]
        return {
            key: value for key, value in record.items() if key == "step" or step > self._has.get(key, -1)
        }

    def _log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Logs figures, each at the step of its record. A figure that is not finite (None) is left out."""
        from mlflow.entities import Metric

        # Each call has a time of its own, also two calls within a millisecond: epoch() tells epochs by it.
        self._now_ms = max(int(1000 * time.time()), self._now_ms + 1)
        metrics = [
            Metric(key, float(value), self._now_ms, record["step"])
            for record in records
            for key, value in record.items()
            if key != "step" and value is not None
        ]
        for begin in range(0, len(metrics), _MOST_METRICS):
            part = metrics[begin : begin + _MOST_METRICS]
            self._client.log_batch(self._id, metrics=part)
            self._has.update({each.key: each.step for each in part})
            self._logged_ms.update({each.key: each.timestamp for each in part})
