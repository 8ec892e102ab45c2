#!/usr/bin/env bash
# The 5:1 recipe, five updates of the fake score for one of the student: residual and regression-only students beside DAR
# with one thread each, then the report.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
began=$SECONDS
# as when docs/results/long was recorded
solver=(solver=heun solver_steps=15 solver_grid=even)
recorded=(rollouts=fresh "${solver[@]/#/regression.}")
(
  python distill.py config=configs/photos32/residual.yaml "${recorded[@]}"
  python distill.py config=configs/photos32/regression.yaml "${recorded[@]}"
) &
baselines=$!
trap 'kill $baselines 2>/dev/null || true' EXIT
python distill.py config=configs/photos32/dar.yaml "${recorded[@]}"
wait $baselines
trap - EXIT
echo "students: $((SECONDS - began)) s"
python -m eval.report runs=[out/photos32/residual,out/photos32/dar,out/photos32/regression] out=out/photos32/report \
  n=1024 metrics=[offline] "${solver[@]}" title="Photos at 32 px, 5:1 recipe"
