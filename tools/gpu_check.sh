#!/usr/bin/env bash
# What one GPU can prove and measure in about eight minutes, with nothing to download:
#   bash tools/gpu_check.sh [gpu.json] [--nanogpt=../nanoGPT]     tests against the CPU, then training and decoding
#   bash tools/gpu_check.sh --rehearse                            the same on the CPU, with tiny shapes
set -euo pipefail
cd "$(dirname "$0")/.."
results=gpu.json flags=()
for argument in "$@"; do
    case $argument in
        --rehearse) export REHEARSE=1; flags+=(--rehearse=True) ;;
        --*) flags+=("$argument") ;;
        *) results=$argument ;;
    esac
done
python -c 'import torch; print("torch", torch.__version__, *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))'
python -m pytest -q -n0 -m gpu tests/gpu
python tools/bench.py gpu --json="$results" "${flags[@]}"
echo "the results are in $results"
