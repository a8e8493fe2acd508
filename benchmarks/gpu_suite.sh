#!/usr/bin/env bash
# What there is to know of the kernels on one GPU: correctness first, then the tables. Results go to the folder given.
#   benchmarks/gpu_suite.sh [benchmarks/results/h100]
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results/gpu}
mkdir -p "$results"
python -m pytest -q -m "not slow" tests/kernels tests/benchmarks tests/data/test_prefetch.py tests/distributed/test_triton_training.py
lengths=128,256,512,1024,2048,4096,8192
python -m benchmarks.attention --lengths "$lengths" --json "$results/attention_uniform.json"
python -m benchmarks.attention --lengths "$lengths" --skewed --json "$results/attention_skewed.json"
python -m benchmarks.sampled_softmax --json "$results/sampled_softmax.json"
python -m benchmarks.expert_ffn --json "$results/expert_ffn.json"
python -m benchmarks.expert_ffn --skewed --json "$results/expert_ffn_skewed.json"
python -m benchmarks.elementwise --json "$results/elementwise.json"
python -m benchmarks.step_memory --lengths 2048,4096,8192 --json "$results/step_memory.json"
