#!/usr/bin/env bash
# A GPT beside BERT, an LSTM and a GPT whose sentences are in random order: models of about one size read as many tokens of
# a corpus, then learn GPT-1's four tasks from 500 labels each; a seed is a pre-trained model and its fine-tuning.
# docs/results/relatives.md discusses the results; they go to out/relatives, with the checkpoints that
# examples/gpt1_zero_shot.py reads. A seed takes about half an hour of a CPU core. A second run continues where the first
# stopped.
#
#   bash examples/relatives_arc.sh             # three seeds
#   SEEDS=1 TASKS=package MODELS="gpt bert" bash examples/relatives_arc.sh
#   ONLY=data bash examples/relatives_arc.sh  # prepare the data and stop
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
seeds=${SEEDS:-1 2 3}
tasks=${TASKS:-package follows related next_sentence}
models=${MODELS:-gpt bert lstm shuffled}
out=out/relatives
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

ONLY=data bash "$repository/examples/gpt1_arc.sh"
if [[ $models == *shuffled* && ! -f data/gpt1_shuffled/meta.json ]]; then
    python "$repository/examples/shuffle_sentences.py" gpt1_text --name=gpt1_shuffled
fi
if [ "${ONLY:-}" = data ]; then exit; fi

pretrain() {  # model, seed
    if [ -e "$out/$1/$2/step-00000600" ]; then return; fi
    local flags
    case $1 in
        gpt) flags=(--dataset=gpt1_text) ;;
        bert) flags=(--attention=bidirectional) ;;
        lstm) flags=(--mixer=lstm --positions=none --qk_norm=False --n_layer=3) ;;  # 0.73M parameters, the GPT 0.72M
        shuffled) flags=(--dataset=gpt1_shuffled) ;;
    esac
    python "$repository/train.py" "$repository/examples/relatives.toml" "${flags[@]}" --seed="$2" --out_dir="$out/$1/$2" \
        --init_from=auto
}

finetune() {  # task, model, seed
    local folder=$out/$1/$2/$3 data=data/gpt1_arc/$1 task epochs=5
    if [ -f "$folder/report.json" ]; then return; fi
    case $1 in
        package) task=classification ;;
        follows) task=entailment ;;
        related) task=similarity ;;
        next_sentence) task=multiple_choice epochs=3 ;;  # four sequences an example
    esac
    mkdir -p "$folder"
    if ! python "$repository/stages/finetune.py" "$out/$2/$3" --task $task --language_weight=0 \
        --train "$data/train.jsonl" --val "$data/val.jsonl" --test "$data/test.jsonl" \
        --epochs=$epochs --learning_rate=1e-3 --warmup=0.1 --seed="$3" --out_dir="$folder" --overwrite \
        > "$folder.log" 2>&1; then
        cat "$folder.log"
        return 1
    fi
    echo "$1, $2, seed $3: $(grep '^test:' "$folder.log")"
    rm -rf "$folder"/step-* "$folder"/last "$folder"/best  # keep the report only
}
for seed in $seeds; do
    for model in $models; do
        pretrain $model "$seed"
        for task in $tasks; do finetune "$task" $model "$seed"; done
    done
done
python "$repository/examples/relatives_report.py" --results $out
