"""The plan of a run in a process of its own: ``python -m pipeline.plan_process RUN_DIR STAGE...`` (started by run.py).

Leaves ``plan.json`` in the run's folder, so that estimates can be held against what was measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.artifacts import write_json
from pipeline.processes import run_as_child
from pipeline.run import load_run_config

PLAN_NAME = "plan.json"


def plan(run_dir: Path, stages: list[str]) -> None:
    from pipeline.plan import make_plan, raise_if_impossible
    from pipeline.plan_display import print_plan

    made = make_plan(load_run_config(run_dir), run_dir, stages=stages)
    write_json(run_dir / PLAN_NAME, made.model_dump(mode="json"))
    print_plan(made, with_example=False)
    raise_if_impossible(made)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.exit(run_as_child("plan", folder, lambda: plan(folder, sys.argv[2:])))
