#!/usr/bin/env bash
# GPT beside BERT at equal compute: models of one size read the same tokens of a corpus, then learn GPT-1's four tasks from
# 500 labels each. Only the attention and the objective differ. docs/results/relatives.md discusses the results; they go to
# out/relatives. This takes about a quarter of an hour of one idle CPU core. A second run continues where the first stopped.
#
#   bash examples/relatives_arc.sh
#   SEEDS=1 TASKS=package bash examples/relatives_arc.sh
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
seeds=${SEEDS:-1 2 3}
tasks=${TASKS:-package follows related next_sentence}
out=out/relatives
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ ! -d data/gpt1_arc ]; then
    python "$repository/examples/gpt1_data.py" --output data/gpt1_arc
fi
if [ ! -f data/gpt1_text/meta.json ]; then
    corpus=data/gpt1_arc/corpus.jsonl
    python "$repository/prepare/tokenizer.py" --input $corpus --vocab_size 4096 --name gpt1_text
    python "$repository/prepare/text.py" --input $corpus --tokenizer gpt1_text --name gpt1_text --val_fraction 0.02
fi
for model in gpt bert; do
    if [ -e $out/$model/last ]; then continue; fi
    attention=$([ $model = gpt ] && echo causal || echo bidirectional)
    python "$repository/train.py" "$repository/examples/relatives.toml" --attention="$attention" --seed=1 \
        --out_dir=$out/$model --overwrite
done

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
    if ! python "$repository/stages/finetune.py" $out/"$2" --task $task --language_weight=0 \
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
    for task in $tasks; do
        for model in gpt bert; do finetune "$task" $model "$seed"; done
    done
done
python "$repository/examples/relatives_report.py" --results $out
