"""The plan of a run in a process of its own: ``python -m pipeline.plan_process RUN_DIR STAGE...`` (started by run.py).

Leaves ``plan.json`` in the run's folder, so that estimates can be held against what was measured.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.artifacts import write_json
from pipeline.errors import MedcotError
from pipeline.processes import end_with_parent, quiet_libraries
from pipeline.run import load_run_config

PLAN_NAME = "plan.json"


def main(run_dir: Path, stages: list[str]) -> int:
    end_with_parent()
    quiet_libraries()
    os.dup2(2, 1)  # under --json standard output belongs to the result alone
    from pipeline.plan import make_plan, raise_if_impossible
    from pipeline.plan_display import print_plan

    try:
        plan = make_plan(load_run_config(run_dir), run_dir, stages=stages)
        write_json(run_dir / PLAN_NAME, plan.model_dump(mode="json"))
        print_plan(plan, with_example=False)
        raise_if_impossible(plan)
    except MedcotError as error:
        if os.environ.get("MEDCOT_DEBUG"):
            raise
        print(f"Error in plan: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
