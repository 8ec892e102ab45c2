#!/usr/bin/env bash
# The 5:1 recipe, five updates of the fake score for one of the student: residual and regression-only students beside DAR
# with one thread each, then the report.
# rollouts=fresh: as when docs/results/long was recorded.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
began=$SECONDS
(
  python distill.py config=configs/photos32/residual.yaml rollouts=fresh
  python distill.py config=configs/photos32/regression.yaml rollouts=fresh
) &
baselines=$!
trap 'kill $baselines 2>/dev/null || true' EXIT
python distill.py config=configs/photos32/dar.yaml rollouts=fresh
wait $baselines
trap - EXIT
echo "students: $((SECONDS - began)) s"
python -m eval.report runs=[out/photos32/residual,out/photos32/dar,out/photos32/regression] out=out/photos32/report \
  n=1024 metrics=[offline] title="Photos at 32 px, 5:1 recipe"
