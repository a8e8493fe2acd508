#!/usr/bin/env bash
# Measures kernels and training on one GPU in eight minutes and writes $OUT/results.jsonl (see benchmarks/gpu_suite/__main__.py).
#   OUT=benchmarks/raw/h100 benchmarks/gpu_suite.sh [--dry] [--only attention,experts]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_suite "$@"
