#!/usr/bin/env bash
# From data to a verified GGUF and a report, in one command:
#
#   ./run_pipeline.sh                     the embedded default (SmolLM2-135M, two CPU cores, about ten minutes)
#   ./run_pipeline.sh deepseek-r1-8b      the 8B preset, on a GPU
#   ./run_pipeline.sh --set training.max_steps=30
#
# Arguments are those of `medcot run`. The first call sets up an environment; an interrupted run goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/scripts/setup.sh"
exec "$PYTHON" -m pipeline.cli run "$@"
