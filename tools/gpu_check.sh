#!/usr/bin/env bash
# What one GPU can prove and measure in about eight minutes, with nothing to download:
#   bash tools/gpu_check.sh [gpu.json] [--nanogpt=../nanoGPT]     tests against the CPU, then training and decoding
#   bash tools/gpu_check.sh --rehearse                            the same on the CPU, with tiny shapes
# The results go to out/gpu.json, those of a rehearsal to out/gpu_rehearsal.json, unless a file is named.
set -euo pipefail
cd "$(dirname "$0")/.."
results= name=gpu flags=()
for argument in "$@"; do
    case $argument in
        --rehearse) export REHEARSE=1; name=gpu_rehearsal flags+=(--rehearse=True) ;;
        --*) flags+=("$argument") ;;
        *) results=$argument ;;
    esac
done
mkdir -p out
flags+=(--json="${results:-out/$name.json}")
python tools/bench.py gpu "${flags[@]}" --check=True  # before minutes of tests
python -c 'import torch; print("torch", torch.__version__, *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))'
python -m pytest -q -n0 -m gpu tests/gpu
python tools/bench.py gpu "${flags[@]}"
echo "the results are in ${results:-out/$name.json}"
