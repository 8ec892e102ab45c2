#!/usr/bin/env bash
# The 5:1 recipe, residual against DAR, side by side with one thread each, then the report.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python distill.py config=configs/photos32/residual.yaml &
residual=$!
python distill.py config=configs/photos32/dar.yaml
wait "$residual"
python -m eval.report runs=[out/photos32/residual,out/photos32/dar] reference=teacher out=out/photos32/report n=1024 \
  title="Photos at 32 px, 5:1 recipe"
