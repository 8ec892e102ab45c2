#!/usr/bin/env bash
# Why routers do little in the pilot: its DAR student of seed 0 again with one choice changed at a time, then a report
# and what the routers learned. After runs/pilot.sh; what is done is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

train() { # name key=value ...
  python distill.py config=configs/photos32/pilot_dar.yaml "out_dir=out/pilot_routers/$1" "${@:2}"
}

(
  train rate student.routing.lr=1e-2
  train chunks student.routing.chunk_size=2
  train convex student.routing.scale=convex student.routing.allow_change=true
) &
others=$!
trap 'kill $others 2>/dev/null || true' EXIT
train longer steps=250 student.decay_start=140 student.decay_steps=135
wait $others
trap - EXIT
runs=out/pilot/dar_seed0
for name in rate chunks convex longer; do runs+=",out/pilot_routers/$name"; done
export OMP_NUM_THREADS=${EVAL_THREADS:-2}
python -m eval.report "runs=[out/pilot/residual_seed0,$runs]" out=out/pilot_routers/report n=512 metrics=[offline] \
  solver=heun solver_steps=15 solver_grid=even \
  title="Pilot at toy scale, routers with one choice changed at a time"
python -m dmd_dar.diagnostics run=out/pilot/dar_seed0 compare=out/pilot_routers/rate out=out/pilot_routers/diagnostics \
  samples=256 probe_pairs=256
