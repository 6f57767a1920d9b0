"""A sweep's experiments on a Ray cluster: Ray Tune decides where each runs and starts it again when a machine is lost.

    ray start --head                                # on one machine
    ray start --address=FIRST:6379                  # on the others
    medcot sweep EXPERIMENTS --out /shared/sweep --ray FIRST:6379

Every machine needs medcot and sees the sweep's folder under the same path: what a lost machine had done is there for
the next one. One experiment at a time has a GPU, or a whole machine where there are none.
https://docs.ray.io/en/latest/tune/tutorials/tune-fault-tolerance.html
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pipeline.errors import MedcotError
from pipeline.run import CONFIG_NAME
from pipeline.sweep_process import ExperimentProcess

MACHINES_LOST = 3  # so often an experiment is started again
_TUNE_FOLDER = ".ray"


def run_on_ray(
    run_dirs: Sequence[Path], until: str, address: str, out: Path, announce: Callable[[str], None]
) -> dict[Path, str | None]:
    """Run all folders' configurations on the cluster at ``address``; gives why each failed, or None.

    "local" starts a cluster of this machine alone. Raises MedcotError when Ray or the cluster is not there.
    """
    # Ray reports its use to its makers unless told not to; Tune's loggers would repeat metrics.jsonl.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise MedcotError(f"--ray needs Ray ({error}): pip install 'medcot[ray]' on every machine.") from error
    if not run_dirs:
        return {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MedcotError(
            f"No Ray cluster answers at {address} ({_first_line(error)}): start one with 'ray start --head', or use "
            "--ray local."
        ) from error
    shutil.rmtree(out / _TUNE_FOLDER, ignore_errors=True)  # an earlier sweep's; what counts is in the runs' folders
    (out / _TUNE_FOLDER).mkdir()
    try:
        tuner = tune.Tuner(
            tune.with_resources(_run_experiment, _one_experiment_takes(ray)),
            param_space={"run_dir": tune.grid_search([str(folder) for folder in run_dirs]), "until": until},
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(out / _TUNE_FOLDER),
                failure_config=tune.FailureConfig(max_failures=MACHINES_LOST),
                callbacks=[_announcing(tune.Callback, announce)],
                verbose=0,
            ),
        )
        # Tune prints a banner whatever its verbosity; standard output belongs to the result.
        with (out / _TUNE_FOLDER / "tune.log").open("w", encoding="utf-8") as log, redirect_stdout(log):
            results = tuner.fit()
    finally:
        ray.shutdown()
    return {Path(result.config["run_dir"]): _failure(result) for result in results}


def _run_experiment(parameters: dict[str, Any]) -> None:
    """A trial, on the machine that Ray chose. A failed run is a result: only a lost machine is worth another try."""
    from ray import tune

    run_dir = Path(parameters["run_dir"])
    if not (run_dir / CONFIG_NAME).is_file():
        failure: str | None = (
            f"Error: {socket.gethostname()} does not see {run_dir}: --out must be a folder that all machines share."
        )
    else:
        process = ExperimentProcess(run_dir, parameters["until"], {})
        process.wait()
        failure = process.failure()
    tune.report({"failure": failure or ""})


def _one_experiment_takes(ray: Any) -> dict[str, float]:
    if ray.cluster_resources().get("GPU", 0) >= 1:
        return {"CPU": 1, "GPU": 1}
    cores = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return {"CPU": min((count for count in cores if count >= 1), default=1)}


def _announcing(callback: type[Any], announce: Callable[[str], None]) -> Any:
    class Announcing(callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            announce(f"{Path(trial.config['run_dir']).name}: started by Ray")

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            announce(f"{Path(trial.config['run_dir']).name}: lost, Ray starts it again")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            announce(f"{Path(trial.config['run_dir']).name}: ended")

    return Announcing()


def _failure(result: Any) -> str | None:
    if result.error is not None:
        return f"given up by Ray after {MACHINES_LOST + 1} attempts: {_first_line(result.error)}"
    return (result.metrics or {}).get("failure", "interrupted") or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
