#!/usr/bin/env bash
# The demo: three four-step students of the shipped teacher, and the report that compares them. `make demo` calls it.
# The baselines are trained beside the student with DAR, each on half of the cores: two small networks side by side use
# them better than one after the other.
set -euo pipefail
set -m # a lane in the background is a process group, which a fault in the other one ends whole
cd "$(dirname "$0")/.."
began=$SECONDS
cores=$(getconf _NPROCESSORS_ONLN)
threads=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}
lane() {
  for arm in "$@"; do
    python distill.py config=configs/photos32/demo_"$arm".yaml launch.threads="$threads" 2>&1 |
      (
        trap "" INT TERM # says what a stopped run has to say
        while IFS= read -r line; do echo "$arm: $line"; done
      )
  done
}
lane residual regression &
baselines=$!
trap 'kill -- -$baselines 2>/dev/null || true' EXIT
lane dar
wait $baselines
trap - EXIT
echo "students: $((SECONDS - began)) s"
python -m eval.report runs=[out/demo/residual,out/demo/dar,out/demo/regression] out=out/demo/report n=1024 \
  metrics=[offline]
echo "demo: $((SECONDS - began)) s"
