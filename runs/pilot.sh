#!/usr/bin/env bash
# The pilot: residual and DAR students from three training seeds each, two at a time with one thread each, then the
# comparison and the report; what is done is kept. FROZEN=1 adds the control with static routers, SEEDS="0 1 2 3 4 5"
# more seeds (REPORTED="0" of them in the report), KEYS="steps=250 fake_score.updates=5" another recipe, OUT another
# folder, TITLE the report's title, JOBS=16 students at a time where there are the cores, EVAL_THREADS=16 threads for the
# comparison.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
seeds=${SEEDS:-"0 1 2"}
out=${OUT:-out/pilot}
began=$SECONDS
reference=(solver=heun solver_steps=15 solver_grid=even) # as when docs/pilot.md was recorded
arms=(residual dar)
[[ -n ${FROZEN:-} ]] && arms+=(frozen)

runs() { # arm [seeds] -> RUN,RUN,...
  local list="" seed
  for seed in ${2:-$seeds}; do list+=",$out/$1_seed$seed"; done
  echo "${list:1}"
}

students() {
  local seed arm
  for seed in $seeds; do
    for arm in "${arms[@]}"; do
      echo "config=configs/photos32/pilot_$arm.yaml seed=$seed out_dir=$out/${arm}_seed$seed${KEYS:+ $KEYS}"
    done
  done
}

stopped() { # xargs would leave its students behind; each of them saves a checkpoint and ends
  local running pid
  running=$(pgrep -P "$pool" || true)
  kill "$pool"
  for pid in $running; do kill "$pid" || true; done
  for pid in $running; do while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done; done
  exit 143
}

xargs -P "${JOBS:-2}" -L 1 python distill.py < <(students) &
pool=$!
trap stopped TERM INT
wait "$pool"
trap - TERM INT
echo "students: $((SECONDS - began)) s"
compared=()
for arm in "${arms[@]}"; do compared+=("arms.$arm=[$(runs "$arm")]"); done
export OMP_NUM_THREADS=${EVAL_THREADS:-2}
python -m eval.compare "${compared[@]}" "out=$out/compare" n=1024 "${reference[@]}"
echo "compared: $((SECONDS - began)) s"
python -m eval.report "runs=[$(runs residual "${REPORTED:-}"),$(runs dar "${REPORTED:-}")]" "compare=$out/compare/compare.json" "out=$out/report" \
  n=1024 metrics=[offline] "${reference[@]}" "title=${TITLE:-Pilot at toy scale, residual and DAR students from several training seeds each}"
echo "report: $((SECONDS - began)) s"
