"""Sends a run's curves to experiment trackers: TensorBoard, Weights & Biases and MLflow (`train.trackers`).

wandb and MLflow take their settings from their own environment variables, such as WANDB_MODE and MLFLOW_TRACKING_URI. A
resumed run continues the same run there: trackers.json in the run's folder holds the ids.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mme.errors import UserError, first_line
from mme.files import make_folder, read_json, write_text

IDS_FILE = "trackers.json"  # in a run's folder
PACKAGES = ("wandb", "mlflow")  # not always installed; the extras have the same names
MLFLOW_PARAMETERS, MLFLOW_METRICS = 100, 1000  # the most in one request
PROJECT = "mme"  # wandb's project and MLflow's experiment, unless their environment variables name another


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker learns about a run.

    Attributes:
        folder: the run's folder.
        settings: the configuration's values by full key.
        resume_step: the step after which the run resumes; 0 for a new run.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    resume_step: int = 0

    def earlier_id(self, tracker: str) -> str | None:
        """The tracker's id of this run, if it resumes and had one."""
        return self._ids().get(tracker) if self.resume_step else None

    def keep_id(self, tracker: str, run_id: str) -> None:
        ids = self._ids() | {tracker: run_id}
        write_text(self.folder / IDS_FILE, json.dumps(ids) + "\n", self.folder)

    def _ids(self) -> dict[str, str]:
        """Raises UserError if a link, folder or pipe is in the file's place."""
        path = self.folder / IDS_FILE
        try:
            found: Any = read_json(path, self.folder)
        except (FileNotFoundError, ValueError):
            found = None  # a new run, or a file that was cut off: the tracker gets a new run
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: expected a regular file with the trackers' ids") from error
        return {name: str(run_id) for name, run_id in found.items()} if isinstance(found, dict) else {}


class Tracker(Protocol):
    """A place that receives curves.

    Attributes:
        where: where the run can be found there; empty: in the run's folder, as always.
        errors: exceptions of `log` and `close` that must not end the training.
    """

    where: str
    errors: tuple[type[Exception], ...]

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


def require_packages(trackers: Sequence[str]) -> None:
    """Raises UserError if the package of a tracker is not installed. Imports nothing."""
    for name in trackers:
        if name in PACKAGES and importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers names {name}, which is not installed: `pip install 'mme[{name}]'`")


class Trackers:
    """The trackers of one run; ``warn`` receives their errors, of which only those of TensorBoard end the training."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._started: list[tuple[str, Tracker]] = []

    def start(self, names: Sequence[str], run: TrackedRun) -> list[str]:
        """Starts trackers (`mme.config.train.TRACKERS`) and returns a line about each that keeps the run elsewhere.

        Raises:
            UserError: a tracker cannot be used, for example because it has no credentials or its server does not answer.
        """
        classes: dict[str, Callable[[TrackedRun], Tracker]]
        classes = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
        for name in names:
            self._started.append((name, classes[name](run)))
        return [f"{name}: {tracker.where}" for name, tracker in self._started if tracker.where]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in self._started:
            with self._tolerated(name, tracker):
                tracker.log(step, values)

    def close(self, failed: bool) -> None:
        """Ends the run in every tracker, as failed or finished; safe to call twice."""
        started, self._started = self._started, []
        for name, tracker in started:
            with suppress(OSError), self._tolerated(name, tracker):  # TensorBoard's lines were flushed before
                tracker.close(failed)

    @contextmanager
    def _tolerated(self, name: str, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except tracker.errors as error:
            self._warn(f"{name}: {first_line(error)}")


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder. A write that fails ends the training, as for metrics.jsonl."""

    where = ""
    errors: tuple[type[Exception], ...] = ()

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        make_folder(folder, run.folder)
        if not run.resume_step:  # of an earlier run in this folder
            for curves in folder.glob("events.*"):
                curves.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=run.resume_step + 1 if run.resume_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, whose files lie in ``wandb/`` of the run's folder.

    ``step`` is a metric of its own and the x axis of all others: wandb drops values whose own step is lower than an earlier
    one, such as the test metrics of the best checkpoint.
    """

    # wandb's own errors and those of its service process have no common base class.
    errors: tuple[type[Exception], ...] = (Exception,)

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        make_folder(run.folder / "wandb", run.folder)  # refuses a link, which wandb would follow
        run_id = run.earlier_id("wandb") or secrets.token_hex(4)
        settings = wandb.Settings(silent=True, console="off")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", run.folder.resolve().name),
                dir=str(run.folder),
                id=run_id,
                resume="allow",
                config=dict(run.settings),
                settings=settings,
            )
        except Exception as error:
            raise UserError(
                f"train.trackers: wandb: {first_line(error)} (WANDB_MODE=offline needs neither an account nor a network)"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        run.keep_id("wandb", run_id)
        offline = self._run.settings.mode == "offline"
        self.where = str(Path(self._run.dir).parent) if offline else str(self._run.url)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow with the configuration as parameters. ``@``, which MLflow does not allow in a name, becomes ``_at_``."""

    errors: tuple[type[Exception], ...] = (
        Exception,
    )  # MLflow's own errors and those of the store: requests, SQLAlchemy, …

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric = Metric
        try:
            uri = mlflow.get_tracking_uri()
            self._client = mlflow.MlflowClient(uri)
            self._id = self._resumed(run.earlier_id("mlflow")) or self._created(run.folder.resolve().name)
            if not run.resume_step:
                parameters = [Param(key, str(value)) for key, value in run.settings.items()]
                for some in _parts(parameters, MLFLOW_PARAMETERS):
                    self._client.log_batch(self._id, params=some)
        except Exception as error:
            raise UserError(f"train.trackers: mlflow: {first_line(error)}") from error
        run.keep_id("mlflow", self._id)
        self.where = f"run {self._id} in {uri}"

    def _resumed(self, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None  # the run resumes with another store
        return run_id

    def _created(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        return str(self._client.create_run(experiment_id, run_name=name).info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(1000 * time.time())
        metrics = [
            self._metric(name.replace("@", "_at_"), float(value), now_ms, step) for name, value in values.items()
        ]
        for some in _parts(metrics, MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=some)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _parts(values: list[Any], length: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), length):
        yield values[start : start + length]
