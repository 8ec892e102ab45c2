#!/usr/bin/env bash
# The demo: three four-step students of the shipped teacher, and the report that compares them. `make demo` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS
for arm in residual dar regression; do
  echo "== student: $arm"
  python distill.py config=configs/photos32/demo_$arm.yaml
done
echo "== report"
python -m eval.report runs=[out/demo/residual,out/demo/dar,out/demo/regression] out=out/demo/report n=1024 \
  metrics=[offline]
echo "demo: $((SECONDS - began)) s"
