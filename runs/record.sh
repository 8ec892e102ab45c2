#!/usr/bin/env bash
# Keep the numbers and figures of what was measured for README and docs, in docs/results/NAME, then write their tables:
#   bash runs/record.sh demo out/demo/report
#   bash runs/record.sh pilot out/pilot/report out/pilot/compare
#   bash runs/record.sh pilot_routers out/pilot_routers/report out/pilot_routers/diagnostics
#   bash runs/record.sh diagnostics out/photos32/teacher_dar/diagnostics
#   bash runs/record.sh teacher_dar out/photos32/teacher_dar/quality
set -euo pipefail
cd "$(dirname "$0")/.."
kept="docs/results/$1"
mkdir -p "$kept"
for folder in "${@:2}"; do
  if [[ -f $folder/report.json ]]; then
    cp "$folder/report.json" "$kept/"
    if [[ ! -f ${3:-}/diagnostics.json ]]; then cp "$folder"/{gain.png,samples.png} "$kept/"; fi
  elif [[ -f $folder/compare.json ]]; then
    rm -rf "$kept/runs"
    cp -r "$folder"/{compare.json,runs} "$2"/{forest.png,curves.png} "$kept/"
  elif [[ -f $folder/diagnostics.json ]]; then
    cp "$folder"/{diagnostics.json,routers.png} "$kept/"
    if [[ $# -eq 2 ]]; then cp "$folder"/{mixing.png,symptoms.png} "$kept/"; fi
  else
    cp "$folder/quality.json" "$kept/"
  fi
done
python runs/tables.py
