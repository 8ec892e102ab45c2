#!/usr/bin/env bash
# How the shipped teacher was made and judged. About an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m dmd_dar.pretrain config=configs/photos32/teacher.yaml
mkdir -p teachers/photos32
rm -f teachers/photos32/model.json teachers/photos32/model.safetensors  # an older form of the folder
cp -r out/photos32/teacher/student/* out/photos32/teacher/config.yaml out/photos32/teacher/log.jsonl teachers/photos32/
python -m eval.teacher path=teachers/photos32 out=teachers/photos32 n=2048 \
  solver=heun solver_steps=32 solver_grid=even
