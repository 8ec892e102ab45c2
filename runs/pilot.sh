#!/usr/bin/env bash
# The pilot: residual and DAR students from three training seeds each, one thread per arm side by side, then the
# comparison and the report. FROZEN=1 adds the control with static routers, SEEDS="0 1 2 3 4 5" more seeds,
# KEYS=fake_score.per_rung=false another method, OUT another folder; what is done is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
seeds=${SEEDS:-"0 1 2"}
out=${OUT:-out/pilot}
began=$SECONDS

train() { # arm
  for seed in $seeds; do
    python distill.py "config=configs/photos32/pilot_$1.yaml" "seed=$seed" "out_dir=$out/$1_seed$seed" ${KEYS:-}
  done
}

runs() { # arm -> [RUN,RUN,...]
  local list=""
  for seed in $seeds; do list+=",$out/$1_seed$seed"; done
  echo "[${list:1}]"
}

train residual &
residual=$!
trap 'kill $residual 2>/dev/null || true' EXIT
train dar
wait $residual
trap - EXIT
arms=("arms.residual=$(runs residual)" "arms.dar=$(runs dar)")
if [[ -n ${FROZEN:-} ]]; then
  train frozen
  arms+=("arms.frozen=$(runs frozen)")
fi
echo "students: $((SECONDS - began)) s"
OMP_NUM_THREADS=${EVAL_THREADS:-2} python -m eval.compare "${arms[@]}" "out=$out/compare" n=1024
echo "pilot: $((SECONDS - began)) s"
OMP_NUM_THREADS=${EVAL_THREADS:-2} python -m eval.report "runs=[$(runs residual | tr -d '[]'),$(runs dar | tr -d '[]')]" \
  "compare=$out/compare/compare.json" "out=$out/report" n=1024 metrics=[offline] \
  title="Pilot at toy scale, residual and DAR students from three training seeds each"
echo "report: $((SECONDS - began)) s"
