"""One stage in a process of its own: ``python -m pipeline.stage_process STAGE RUN_DIR`` (started by run.py)."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

from pipeline.artifacts import (
    IN_PROGRESS_NAME,
    FileRecord,
    Manifest,
    artifact_files,
    sha256_file,
    write_manifest,
)
from pipeline.errors import MedcotError
from pipeline.memory import peak_memory_bytes
from pipeline.processes import end_with_parent, quiet_libraries
from pipeline.run import (
    identify,
    load_run_config,
    stage_inputs,
    stage_named,
)


def main(stage_name: str, run_dir: Path) -> int:
    """Run one stage and write its manifest; returns the exit status, the message is on standard error."""
    end_with_parent()
    quiet_libraries()
    # Libraries print to standard output; under --json that belongs to the result alone.
    os.dup2(2, 1)
    try:
        perform(stage_name, run_dir)
    except MedcotError as error:
        return _complain(stage_name, str(error), error.exit_status)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = f"The disk is full ({error.filename or run_dir}): free some space; the same command goes on."
        else:
            message = f"{error.filename or run_dir}: {error.strerror or error}"
        return _complain(stage_name, message, 1)
    except MemoryError:
        return _complain(stage_name, "Out of memory: lower training.batch_size or model.max_seq_length.", 1)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{type(error).__name__}: {first_line} (an error of medcot or a library; --debug shows where)"
        return _complain(stage_name, message, 1)
    return 0


def perform(stage_name: str, run_dir: Path) -> Manifest:
    """Run the stage in this process and leave a finished artifact in its folder."""
    stage = stage_named(stage_name)
    config = load_run_config(run_dir)
    inputs = stage_inputs(stage, run_dir)
    out_dir = run_dir / stage.folder
    # Before the work: an input that is changed meanwhile must not look up to date afterwards.
    identity = identify(stage, config, run_dir)
    started = time.monotonic()
    result = stage.load()(config, inputs, out_dir)
    files = [
        FileRecord(path=str(path.relative_to(out_dir)), size=path.stat().st_size, sha256=sha256_file(path))
        for path in artifact_files(out_dir)
    ]
    manifest = Manifest(
        stage=stage.name,
        fingerprint=identity.fingerprint,
        config=identity.config,
        inputs=identity.inputs,
        versions=identity.versions,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=peak_memory_bytes(),
        files=files,
        result=result.model_dump(mode="json"),
    )
    write_manifest(out_dir, manifest)
    (out_dir / IN_PROGRESS_NAME).unlink(missing_ok=True)
    return manifest


def _complain(stage_name: str, message: str, status: int) -> int:
    if os.environ.get("MEDCOT_DEBUG"):
        traceback.print_exc()
    print(f"Error in {stage_name}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
