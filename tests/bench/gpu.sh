#!/usr/bin/env bash
# The paths that need a CUDA GPU, tried and timed in at most 8 minutes, without a network: bash tests/bench/gpu.sh [--dry-run] [--out FILE]
# Wants a Python with this package's requirements, torchao and transformers (and trl, for the comparison): PYTHON=/path/to/python bash tests/bench/gpu.sh
# --dry-run does the same with toy models on the CPU. Exit status 0: every stage passed or says why it was left out. The JSON is whole after each stage.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/bench" CUBLAS_WORKSPACE_CONFIG=:4096:8
exec "${PYTHON:-python3}" tests/bench/bench_gpu.py "$@"
