"""How near the plan's estimates were to what a finished run measured.

    python tests/perf/plan_accuracy.py RUN_DIR [--record NAME]

Reads ``plan.json`` and the stages' manifests of a run that was planned and done in one go (``medcot run``), and prints
a table. ``--record`` also adds the run to tests/data/measured_runs.json, which tests/test_estimate.py holds the
estimator to.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from pipeline.artifacts import read_manifest
from pipeline.base_model import local_base
from pipeline.config import Config, load_config
from pipeline.hardware import GIBIBYTE, detect
from pipeline.plan import Plan
from pipeline.run import STAGES, load_run_config

RECORDED = Path(__file__).resolve().parent.parent / "data" / "measured_runs.json"


def main(run_dir: Path, name: str | None) -> None:
    plan = Plan.model_validate_json((run_dir / "plan.json").read_bytes())
    measured = {}
    print("| stage | planned s | measured s | ratio | planned GiB | measured GiB | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for stage in STAGES:
        manifest = read_manifest(run_dir / stage.folder)
        estimate = next((each for each in plan.stages if each.stage == stage.name), None)
        if manifest is None or estimate is None or estimate.seconds is None:
            continue
        measured[stage.name] = {"seconds": manifest.seconds, "peak_memory_bytes": manifest.peak_memory_bytes}
        planned, found = estimate.memory_bytes / GIBIBYTE, manifest.peak_memory_bytes / GIBIBYTE
        print(
            f"| {stage.name} | {estimate.seconds:.0f} | {manifest.seconds:.0f} | "
            f"{estimate.seconds / manifest.seconds:.2f} | {planned:.2f} | {found:.2f} | {planned / found:.2f} |"
        )
    total = sum(each.seconds or 0 for each in plan.stages if each.stage in measured)
    took = sum(each["seconds"] for each in measured.values())
    print(f"| all | {total:.0f} | {took:.0f} | {total / took:.2f} | | | |")
    if name:
        _record(name, run_dir, plan, measured)


def _record(name: str, run_dir: Path, plan: Plan, measured: dict[str, dict[str, float]]) -> None:
    config = load_run_config(run_dir)
    hardware = dataclasses.asdict(detect(run_dir))
    base = local_base(config.model.base, config.model.revision, weights=False)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {"runs": []}
    recorded |= {
        "hardware": {key: value for key, value in hardware.items() if not key.startswith("gpu_")}
        | {"gpu_memory_bytes": 0},
        "architecture": json.loads((base / "config.json").read_text()),
    }
    run = {
        "name": name,
        "overrides": _overrides(config),
        "workload": plan.workload.model_dump(),
        "cpu_gflops": plan.cpu_gflops,
        "dtype": next(choice.value for choice in plan.choices if choice.name == "computation"),
        "stages": measured,
    }
    recorded["runs"] = [*(each for each in recorded["runs"] if each["name"] != name), run]
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(recorded, indent=2) + "\n")


def _overrides(config: Config) -> list[str]:
    """What the run's training and evaluation settings differ in from the default preset."""
    default = load_config(None)
    return [
        f"{section}.{key}={json.dumps(value)}"
        for section in ("model", "training", "evaluation", "bench")
        for key, value in getattr(config, section).model_dump(mode="json").items()
        if value != getattr(default, section).model_dump(mode="json")[key] and key != "base"
    ]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(Path(arguments[0]), arguments[2] if arguments[1:2] == ["--record"] else None)
