#!/usr/bin/env bash
# Keep a report's numbers and figures for the README and docs, a comparison's or the diagnostics' too:
#   bash runs/record.sh demo out/demo/report
#   bash runs/record.sh pilot out/pilot/report out/pilot/compare
#   bash runs/record.sh pilot_routers out/pilot_routers/report out/pilot_routers/diagnostics
set -euo pipefail
cd "$(dirname "$0")/.."
kept="docs/results/$1"
mkdir -p "$kept"
cp "$2"/report.json "$2"/gain.png "$2"/samples.png "$kept/"
if [[ -f ${3:-}/compare.json ]]; then
  rm -rf "$kept/runs"
  cp -r "$3"/compare.json "$3"/runs "$2"/forest.png "$2"/bands.png "$kept/"
elif [[ -n ${3:-} ]]; then
  cp "$3"/diagnostics.json "$3"/routers.png "$kept/"
fi
python -m eval.table
