#!/usr/bin/env bash
# The shipped teacher's recipe with DAR in the place of residual additions: trained, judged, and looked into beside it.
# An hour and a half on two cores. runs/record.sh keeps it: teacher_dar and diagnostics.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m dmd_dar.pretrain config=configs/photos32/teacher_dar.yaml
python -m eval.teacher path=out/photos32/teacher_dar/student out=out/photos32/teacher_dar/quality n=2048 \
  solver=heun solver_steps=32 solver_grid=even
python -m dmd_dar.diagnostics run=teachers/photos32 compare=out/photos32/teacher_dar out=out/photos32/teacher_dar/diagnostics \
  samples=1024 probe_pairs=512
