#!/usr/bin/env bash
# GPT-1's recipe on one machine without a network: pre-train a small GPT on documentation, fine-tune it on four tasks of
# 500 labels each, and repeat the paper's ablations. This takes about an hour on two CPU cores, ten minutes of it for
# pre-training; the table goes to out/gpt1_arc/table.md. A second run continues where the first stopped.
#
#   bash examples/gpt1_arc.sh
#   SEEDS="1 2" TASKS=package JOBS=1 bash examples/gpt1_arc.sh
#   ONLY=data bash examples/gpt1_arc.sh  # prepare the data and stop
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
export repository
seeds=${SEEDS:-1 2 3 4 5}
tasks=${TASKS:-package follows related next_sentence}
variants="pre-trained from_scratch frozen_trunk without_language_loss 2_blocks embeddings_alone"

if [ ! -d data/gpt1_arc ]; then
    python "$repository/examples/gpt1_data.py" --output data/gpt1_arc
fi
if [ ! -f data/gpt1_text/meta.json ]; then
    corpus=data/gpt1_arc/corpus.jsonl
    python "$repository/prepare/tokenizer.py" --input $corpus --vocab_size 4096 --name gpt1_text
    python "$repository/prepare/text.py" --input $corpus --tokenizer gpt1_text --name gpt1_text --val_fraction 0.02
fi
if [ "${ONLY:-}" = data ]; then exit; fi
if [ ! -e out/gpt1_mini/last ]; then
    python "$repository/train.py" "$repository/configs/gpt1_mini.toml" --out_dir=out/gpt1_mini
elif ! grep -q '"step": 4000' out/gpt1_mini/metrics.jsonl; then
    python "$repository/train.py" --init_from=resume --out_dir=out/gpt1_mini
fi

finetune() {  # seed, task, variant
    local folder=out/gpt1_arc/$2/$3/$1 data=data/gpt1_arc/$2 task epochs=5 changed=()
    if [ -f "$folder/report.json" ]; then return; fi
    case $2 in
        package) task=classification ;;
        follows) task=entailment ;;
        related) task=similarity ;;
        next_sentence) task=multiple_choice epochs=3 ;;  # four sequences an example
    esac
    case $3 in
        without_language_loss) changed=(--language_weight=0) ;;
        frozen_trunk) changed=(--freeze_trunk=True --learning_rate=1e-2) ;;  # a head alone needs a higher rate
        2_blocks) changed=(--transfer_blocks=2) ;;
        embeddings_alone) changed=(--transfer_blocks=0) ;;
        from_scratch) changed=(--from_scratch=True) ;;
    esac
    mkdir -p "$folder"
    if ! python "$repository/stages/finetune.py" out/gpt1_mini --task "$task" \
        --train "$data/train.jsonl" --val "$data/val.jsonl" --test "$data/test.jsonl" \
        --epochs=$epochs --learning_rate=5e-4 --warmup=0.1 "${changed[@]}" \
        --seed="$1" --out_dir="$folder" --overwrite=True > "$folder.log" 2>&1; then
        cat "$folder.log"
        return 1
    fi
    echo "$2, $3, seed $1: $(grep '^test:' "$folder.log")"
    rm -rf "$folder"/step-* "$folder"/last "$folder"/best  # keep the report only
}
export -f finetune

jobs=${JOBS:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # one core for each job
for variant in $variants; do
    for seed in $seeds; do
        for task in $tasks; do echo "$seed $task $variant"; done
    done
done | xargs -P "$jobs" -L 1 bash -c 'finetune "$@"' finetune

python - "$variants" "$tasks" <<'PYTHON' | tee out/gpt1_arc/table.md
import json, statistics, sys
from pathlib import Path

variants, tasks = (argument.split() for argument in sys.argv[1:])
print("| test accuracy, % | " + " | ".join(tasks) + " |\n|---|" + "---|" * len(tasks))
for variant in variants:
    cells = []
    for task in tasks:
        paths = Path("out/gpt1_arc").glob(f"{task}/{variant}/*/report.json")
        values = [100 * json.loads(path.read_text())["test"]["accuracy"] for path in paths]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread} ({len(values)})" if values else "")
    print(f"| {variant.replace('_', ' ')} | " + " | ".join(cells) + " |")
PYTHON
