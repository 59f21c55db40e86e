#!/usr/bin/env bash
# Compress one checkpoint with many machines that share a file system: every task of an array job works on its own
# layers, and the one that finishes the last layer puts the checkpoint together.
#
#   sbatch --array=0-7 scripts/array_job.sh CHECKPOINT OUTPUT --method mobe --ratio 0.25 --of experts
#
# Everything behind OUTPUT goes to `jaxmoe compress`. A task that was killed can be run again: it resumes where it
# stopped. The result is the same, byte for byte, as that of a single run. Without SLURM, one after another or each on a
# machine of its own:
#
#   for task in 0 1; do
#     SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=2 bash scripts/array_job.sh CHECKPOINT OUTPUT --method svd --ratio 0.4
#   done
#
# JAXMOE names another program (default: jaxmoe on the PATH).

#SBATCH --job-name=jaxmoe
#SBATCH --time=24:00:00

set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: array_job.sh CHECKPOINT OUTPUT --method M --ratio R [...]" >&2
  exit 2
fi
: "${SLURM_ARRAY_TASK_ID:?set it to the number of this task, 0 or more}"
: "${SLURM_ARRAY_TASK_COUNT:?set it to how many tasks there are}"
jaxmoe=${JAXMOE:-jaxmoe}
checkpoint=$1 output=$2
shift 2
first=${SLURM_ARRAY_TASK_MIN:-0}

# The decoder layers with routed experts, split into one contiguous piece for each task; layers without experts inside a
# piece do no harm.
span=$("$jaxmoe" inspect "$checkpoint" --json | python3 -c '
import json, sys

task, tasks = int(sys.argv[1]), int(sys.argv[2])
layers = json.load(sys.stdin)["moe_layers"]
if not 0 <= task < tasks:
    sys.exit(f"task {task} of {tasks}: number the tasks from 0")
begin, end = (len(layers) * k // tasks for k in (task, task + 1))
if begin < end:
    print(f"{layers[begin]}:{layers[end - 1] + 1}")
' "$((SLURM_ARRAY_TASK_ID - first))" "$SLURM_ARRAY_TASK_COUNT")

if [ -z "$span" ]; then
  echo "task $SLURM_ARRAY_TASK_ID has nothing to do: there are fewer layers than tasks"
  exit 0
fi
exec "$jaxmoe" compress "$checkpoint" "$output" --layers "$span" "$@"
