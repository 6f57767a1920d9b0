"""A sweep on a Ray cluster of two workers, of which one is killed in the middle."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_sweep import write_experiments

from bench.sweep_result import SweepResult
from pipeline.artifacts import read_manifest

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = """
experiments:
  - name: primary
  - {name: low-rank, overrides: {lora.r: 4}}
"""


@pytest.mark.e2e
def test_a_sweep_on_two_workers_survives_the_loss_of_one(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an optional extra")
    from ray.cluster_utils import Cluster

    file, out = write_experiments(tmp_path, EXPERIMENTS), tmp_path / "out"
    # The head has no core, so that experiments run on the two workers alone.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
        command = [sys.executable, "-m", "pipeline.cli", "sweep", str(file), "--out", str(out), "--json"]
        sweep = subprocess.Popen(
            [*command, "--ray", cluster.address], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_until(lambda: sum(is_training(folder) for folder in out.glob("*/adapter")) == 2, sweep)
        cluster.remove_node(workers[0], allow_graceful=False)
        output, messages = sweep.communicate(timeout=1500)
    finally:
        cluster.shutdown()
    assert sweep.returncode == 0, messages[-3000:]
    result = SweepResult.model_validate(json.loads(output))
    assert {row.name: row.state for row in result.experiments} == dict.fromkeys(("primary", "low-rank"), "done")
    assert all(row.differences for row in result.experiments if row.name != "primary")
    assert messages.count("lost, Ray starts it again") == 1, messages
    assert messages.count("started by Ray") == 3, messages
    logs = [path.read_text() for path in out.glob("*/run.log")]
    assert sorted(log.count("train: started") + log.count("train: resumed") for log in logs) == [1, 2]
    for row in result.experiments:
        assert read_manifest(out / row.name / "eval") is not None


def is_training(adapter: Path) -> bool:
    return (adapter / "in_progress.json").is_file()


def wait_until(condition: object, process: subprocess.Popen[str], seconds: float = 600) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)


def test_without_ray_one_sentence_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('not here')")
    code = (
        "from pathlib import Path; from pipeline.sweep_ray import run_on_ray\n"
        f"run_on_ray([], 'evaluate', 'local', Path('{tmp_path}'), print)"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "--ray needs Ray (not here): pip install 'medcot[ray]' on every machine." in outcome.stderr


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = pytest.importorskip("ray.tune", reason="Ray is an optional extra")
    from pipeline.sweep_ray import _run_experiment

    reported: list[dict[str, str]] = []
    monkeypatch.setattr(tune, "report", reported.append)
    _run_experiment({"run_dir": str(tmp_path / "elsewhere"), "until": "evaluate"})
    assert "--out must be a folder that all machines share" in reported[0]["failure"]
