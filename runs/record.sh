#!/usr/bin/env bash
# Keep a report's numbers and figures for the README: bash runs/record.sh pilot out/pilot/report out/pilot/compare
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "docs/results/$1"
cp "$2"/report.json "$2"/gain.png "$2"/samples.png "docs/results/$1/"
if [[ -n ${3:-} ]]; then
  rm -rf "docs/results/$1/runs"
  cp -r "$3"/compare.json "$3"/runs "$2"/forest.png "$2"/bands.png "docs/results/$1/"
fi
python -m eval.table
