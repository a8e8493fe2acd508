"""The search: Optuna proposes trials, `mme.tune.trial` runs them, and a journal on disk records every result.

A search that was stopped resumes: finished trials are read from the journal, and a trial that was running resumes from its
checkpoint. Trials that are below the median of the others at the same number of evaluations are stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from mme.config import load_config, save_config
from mme.data.description import read_info
from mme.data.remote_set import local_folder
from mme.errors import UserError, print_line
from mme.evaluation.record import METRICS
from mme.files import is_regular, make_folder, release_lock, take_lock, write_text
from mme.tune.space import Choice, Interval, override, read_space
from mme.tune.trial import Outcome, remove_checkpoints, run_trial, training_command

STUDY = "mme"
JOURNAL = "journal.log"  # in the folder of the search
TRIALS = "trials"  # folder of the trials' folders
BEST_FOLDER = "best"  # output_dir of the best configuration
UNPRUNED_TRIALS = 4  # trials before one may be stopped
UNPRUNED_EVALUATIONS = 2  # evaluations of each trial before it may be stopped
TRIAL_FOLDER, TRIAL_REASON = "folder", "refused"  # attributes of a trial; the second is the reason of a failure


@dataclass(frozen=True)
class Search:
    """The settings of a search.

    Attributes:
        trials: total number of trials, including those of earlier starts.
        jobs: number of concurrent trials.
        processes: processes per trial.
    """

    config: Path
    space: Path
    output: Path
    overrides: list[str]
    trials: int
    metric: str = "ndcg@10"
    jobs: int = 1
    processes: int = 1
    seed: int = 0
    prune: bool = True


def _print(text: str) -> None:
    print_line(text, sys.stdout)


@dataclass(frozen=True)
class TuneResult:
    """The result of a search.

    Attributes:
        best: the highest value of the metric; None if no trial completed an evaluation.
        rows: one dict per trial: its name, state, metric, values, and the reason of a failure.
    """

    best: float | None
    rows: list[dict[str, Any]]


def tune(search: Search, say: Callable[[str], None] = _print) -> TuneResult:
    """Runs the remaining trials and writes ``best.yaml`` and ``trials.json`` to the output folder.

    Raises:
        UserError: the space or the metric is wrong, the data set is missing or has no validation split, or the folder contains another search or is in use by another process.
        InterruptedError: the search was asked to stop; the same call resumes it.
    """
    space = read_space(search.space, search.config, search.overrides)
    _require_trainable(search, {entry.key for entry in space})
    try:
        search.output.mkdir(parents=True, exist_ok=True)
        make_folder(search.output / TRIALS, search.output)
        lock = take_lock(search.output / ".lock")
    except BlockingIOError as error:
        raise UserError(f"--output {search.output}: another search is running there") from error
    except OSError as error:
        raise UserError(f"--output {error.filename or search.output}: {error.strerror}") from error
    try:
        study = _study(search, space)
        _Runner(search, space, study, say).run()
        return write_results(search, space, study)
    finally:
        release_lock(search.output / ".lock", lock)


def _require_trainable(search: Search, searched: set[str]) -> None:
    """Rejects what would make every trial fail, before anything is written."""
    if search.metric not in METRICS:
        raise UserError(f"--metric {search.metric}: expected {', '.join(METRICS)}")
    data = load_config(search.config, search.overrides).data
    if data.protocol == "leave_one_out" and "data.protocol" not in searched:
        raise UserError(
            "mme tune needs a validation split, which data.protocol=leave_one_out does not have: expected leave_two_out or "
            "global_time"
        )
    if "data.path" not in searched:
        read_info(local_folder(data.path, data.cache_dir))


class _Runner:
    """Runs trials in threads, each of which waits for the processes of one."""

    def __init__(
        self, search: Search, space: list[Choice | Interval], study: optuna.Study, say: Callable[[str], None]
    ) -> None:
        self.search, self.space, self.study, self.say = search, space, study, say
        self.stop = threading.Event()

    def run(self) -> None:
        done = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        remaining = self.search.trials - len(done)
        if remaining <= 0:
            self.say(f"all {len(done)} trials are done")
            return
        slots = iter(range(self.search.jobs))
        with ThreadPoolExecutor(self.search.jobs) as pool:
            counter = threading.Semaphore(remaining)
            futures = [pool.submit(self._work, next(slots), counter) for _ in range(self.search.jobs)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stop.set()
                raise

    def _work(self, slot: int, counter: threading.Semaphore) -> None:
        while not self.stop.is_set() and counter.acquire(blocking=False):
            self._one(self.study.ask(), slot)

    def _one(self, trial: Trial, slot: int) -> None:
        values = {entry.key: entry.suggest(trial) for entry in self.space}
        folder = self.search.output / TRIALS / _folder_of(trial)
        trial.set_user_attr(TRIAL_FOLDER, folder.name)
        overrides = [*self.search.overrides, *(override(key, value) for key, value in values.items())]
        shown = "  ".join(f"{key}={value}" for key, value in values.items())
        try:
            load_config(self.search.config, overrides)
        except UserError as error:
            trial.set_user_attr(TRIAL_REASON, str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            self.say(f"trial {folder.name}: not a valid configuration: {error}")
            return
        self.say(f"trial {folder.name}: {shown}")
        outcome = run_trial(
            training_command(
                self.search.config, [*overrides, f"output_dir={json.dumps(str(folder))}"], self.search.processes
            ),
            folder,
            self.search.metric,
            self._environment(slot),
            lambda number, value: self._lags_behind(trial, number, value),
            self.stop,
        )
        self._tell(trial, folder, outcome)

    def _lags_behind(self, trial: Trial, number: int, value: float) -> bool:
        trial.report(value, number)
        return self.search.prune and trial.should_prune()

    def _tell(self, trial: Trial, folder: Path, outcome: Outcome) -> None:
        if outcome.status is None:
            self.study.tell(trial, state=TrialState.PRUNED)
            self.say(f"trial {folder.name}: stopped below the median ({self.search.metric} {outcome.best or 0:.4f})")
        elif outcome.status == 0 and outcome.best is not None:
            self.study.tell(trial, outcome.best)
            self.say(f"trial {folder.name}: {self.search.metric} {outcome.best:.4f}")
        else:
            reason = outcome.error or f"no {self.search.metric} on a validation split"
            trial.set_user_attr(TRIAL_REASON, reason)
            self.study.tell(trial, state=TrialState.FAIL)
            self.say(f"trial {folder.name}: failed: {reason}")
        best = _best(self.study)
        if best is None or best.user_attrs[TRIAL_FOLDER] != folder.name:
            remove_checkpoints(folder)

    def _environment(self, slot: int) -> dict[str, str]:
        """Environment variables that give each job its share of the cores and GPUs."""
        cores = len(os.sched_getaffinity(0))
        per_process = max(1, cores // (self.search.jobs * self.search.processes))
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(per_process))}
        from launcher.job import gpus

        if found := len(gpus()):
            first = slot * self.search.processes
            visible = [str((first + index) % found) for index in range(self.search.processes)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        return environment


def _study(search: Search, space: list[Choice | Interval]) -> optuna.Study:
    """Opens the study on disk and queues the trials again that an earlier start left running.

    Raises:
        UserError: the folder contains another search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = search.output / JOURNAL
    if journal.is_symlink() or (journal.exists() and not is_regular(journal, search.output)):
        raise UserError(f"{journal}: not a regular file: expected the journal of a search")
    storage = JournalStorage(JournalFileBackend(str(journal)))
    pruner = optuna.pruners.MedianPruner(UNPRUNED_TRIALS, UNPRUNED_EVALUATIONS)
    known = STUDY in optuna.get_all_study_names(storage)
    # Proposals depend on the seed and the number of trials, so that a resumed search does not repeat them.
    count = len(optuna.load_study(study_name=STUDY, storage=storage).trials) if known else 0
    sampler = optuna.samplers.TPESampler(seed=search.seed + count)
    study = optuna.create_study(
        storage=storage, sampler=sampler, pruner=pruner, study_name=STUDY, direction="maximize", load_if_exists=True
    )
    for name, value in _identity(search, space).items():
        found = study.user_attrs.setdefault(name, value) if known else value
        if found != value:
            raise UserError(
                f"--output {search.output}: contains a search with another {name}: choose another folder or remove this one"
            )
        study.set_user_attr(name, value)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        study.enqueue_trial(trial.params, user_attrs={TRIAL_FOLDER: _folder_of(trial)})
    return study


def _folder_of(trial: Trial | FrozenTrial) -> str:
    """The name of the trial's folder: its number, or that of the trial that it resumes.

    Raises:
        UserError: the journal, which may be a stranger's, names another place.
    """
    name = str(trial.user_attrs.get(TRIAL_FOLDER, trial.number))
    if not name.isascii() or not name.isdigit():
        raise UserError(f"{JOURNAL}: trial {trial.number}: folder {name!r}, expected the number of a trial")
    return name


def _identity(search: Search, space: list[Choice | Interval]) -> dict[str, str]:
    """The settings that must not change when a search resumes."""

    def digest(value: str) -> str:
        return hashlib.sha256(value.encode()).hexdigest()

    config = load_config(search.config, search.overrides)
    return {
        "configuration": digest(repr(config)),
        "space": digest(repr(space)),
        "metric": search.metric,
    }


def _best(study: optuna.Study) -> FrozenTrial | None:
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return max(complete, key=lambda trial: trial.value or 0.0, default=None)


def _values(trial: FrozenTrial, space: list[Choice | Interval]) -> dict[str, Any]:
    return {entry.key: entry.decode(trial.params[entry.key]) for entry in space if entry.key in trial.params}


def write_results(search: Search, space: list[Choice | Interval], study: optuna.Study) -> TuneResult:
    """Writes trials.json and, if a trial is complete, the best configuration."""
    rows = [
        {
            "trial": _folder_of(trial),
            "state": trial.state.name.lower(),
            search.metric: trial.value if trial.state == TrialState.COMPLETE else None,
            "evaluations": len(trial.intermediate_values),
            "values": _values(trial, space),
            **({"reason": trial.user_attrs[TRIAL_REASON]} if TRIAL_REASON in trial.user_attrs else {}),
        }
        for trial in study.get_trials()
        if trial.state.is_finished()
    ]
    write_text(search.output / "trials.json", json.dumps(rows, indent=1) + "\n", search.output)
    best = _best(study)
    if best is None:
        return TuneResult(None, rows)
    values = _values(best, space)
    config = load_config(search.config, [*search.overrides, *(override(key, value) for key, value in values.items())])
    config.output_dir = str(search.output / BEST_FOLDER)  # not that of the given configuration, where a run may exist
    save_config(config, search.output / "best.yaml")
    return TuneResult(best.value, rows)
