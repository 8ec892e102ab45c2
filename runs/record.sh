#!/usr/bin/env bash
# Keep a report's numbers and figures for the README: bash runs/record.sh demo out/demo/report
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "docs/results/$1"
cp "$2"/report.json "$2"/gain.png "$2"/samples.png "docs/results/$1/"
python -m eval.table
