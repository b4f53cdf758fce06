#!/usr/bin/env bash
# Kinds of positions beyond the trained context: models of 64 characters of context, measured at up to 512 as they are, and
# again after a few steps at 512, beside a model trained at 512 from the start. docs/results/long_context.md discusses the
# results. It writes out/long_context_arc/figures.json and loss.png. This takes about half an hour of one idle CPU core. A
# second run continues where the first stopped. "Longer" models read an eighth as many characters again.
#
#   bash examples/long_context_arc.sh
#   SEED=2 POSITIONS="rotary alibi" SCALINGS="ntk yarn" bash examples/long_context_arc.sh
#   ONLY=data bash examples/long_context_arc.sh  # prepare the data and stop
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
seed=${SEED:-1337}
positions=${POSITIONS:-rotary alibi none sinusoidal learned}
scalings=${SCALINGS:-linear ntk yarn llama3}
folder=${FOLDER:-out/long_context_arc}
steps=2000 more=250
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

for longest in 512 64; do
    if [ ! -f data/long_$longest/meta.json ]; then
        python "$repository/examples/long_context_data.py" --longest=$longest
        tokenizer=$([ $longest = 512 ] && echo char || echo long_512)
        python "$repository/prepare/text.py" --input data/long_context_$longest/corpus.jsonl --name long_$longest \
            --tokenizer "$tokenizer"
    fi
done

if [ "${ONLY:-}" = data ]; then exit; fi
train() {  # name, steps, flags
    local name=$1 steps=$2
    if [ -e "$folder/$name/step-$(printf %08d "$steps")" ]; then return; fi
    python "$repository/train.py" "$repository/configs/long_context.toml" --max_iters="$steps" --seed="$seed" \
        --device=cpu --dtype=float32 --compile=False --out_dir="$folder/$name" --overwrite=True "${@:3}"
}
longer=(--dataset=long_512 --block_size=512 --batch_size=4)  # as many characters a step
extend() {  # name, the model it starts from, flags
    train "$1" $more "${longer[@]}" --init_from="$folder/$2" --extend_context=True --learning_rate=2e-3 --muon_rate=5e-3 "${@:3}"
}

models=()
for kind in $positions; do
    train "$kind" "$steps" --positions="$kind"
    models+=("$folder/$kind")
    if [ "$kind" != learned ]; then
        extend "${kind}_longer" "$kind"
        models+=("$folder/${kind}_longer")
    fi
done
for scaling in $scalings; do
    extend "rotary_$scaling" rotary --rotary_scaling="$scaling" --rotary_factor=8 --rotary_context=64
    models+=("$folder/rotary_$scaling")
done
train rotary_512 $((steps + more)) "${longer[@]}"
models+=("$folder/rotary_512")
python "$repository/tools/long_context.py" "${models[@]}" --dataset=long_512 --context=64 --device=cpu \
    --stretch linear ntk dynamic yarn llama3 --json="$folder/figures.json" --plot="$folder/loss.png"
