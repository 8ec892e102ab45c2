#!/usr/bin/env bash
# What only a GPU can show: the tests of routing on the device, whose default are the fused kernels; short distillations in
# bf16, with every key that saves memory, and with routing in plain torch, one continued; then the benchmarks, into
# benchmarks/results/. ONLY="kernels runs benchmarks" chooses among the three, JOBS=8 tests at a time; logs lie in OUT.
# Without a GPU all but the benchmarks runs on the CPU, to try this script.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
mkdir -p "$out"
failed=0

stage() { # name command ...
  local began=$SECONDS
  if "${@:2}" >"$out/$1.txt" 2>&1; then
    echo "$1: $((SECONDS - began)) s"
  else
    echo "$1: FAILED, $out/$1.txt"
    tail -n 5 "$out/$1.txt"
    failed=1
  fi
}

short() { # name key=value ...
  stage "$1" env ${BACKEND:+DMD_DAR_ROUTING_BACKEND=$BACKEND} python distill.py config=configs/photos32/demo_dar.yaml \
    "out_dir=$out/$1" steps=8 matching.start=2 student.warmup=2 student.decay_start=4 student.decay_steps=4 regression.count=32 log.every=2 \
    checkpoint.every=4 "${@:2}"
}

kernels() {
  stage kernels python -m pytest -q -n "${JOBS:-4}" -p no:cacheprovider tests/routing
}

runs() {
  short plain
  short plain steps=12 # continues
  stage sample python -m dmd_dar.sample "student=$out/plain/student" n=16 "out=$out/images"
  short bf16 launch.precision=bf16 gan.weight=0.01
  short lean weights=shared_lora frozen_dtype=bfloat16 launch.checkpointing=true launch.offload="$(
    python -c 'import torch; print(str(torch.cuda.is_available()).lower())'
  )"
  BACKEND=torch short unfused launch.precision=no
}

benchmarks() {
  if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: no benchmarks"
    return
  fi
  stage turn python -m benchmarks.turn
  stage sampling python -m benchmarks.sampling
  stage routing python -m benchmarks.routing
  python -m benchmarks.performance
}

for part in ${ONLY:-kernels runs benchmarks}; do "$part"; done
exit $failed
