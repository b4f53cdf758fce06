#!/usr/bin/env bash
# GPT-1's arc on one machine without a network: pre-train a small GPT on documentation, fine-tune it on four tasks of 500
# labels, and take away what the paper's ablations take away. An hour and a half on two CPU cores, ten minutes of it
# pre-training; the table is written to out/gpt1_arc/table.md. Run again, it goes on where it stopped.
#
#   bash examples/gpt1_arc.sh
#   SEEDS="1 2" TASKS="package" bash examples/gpt1_arc.sh
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
seeds=${SEEDS:-1 2 3 4 5}
tasks=${TASKS:-package follows paraphrase next_sentence}

declare -A kinds=([package]=classification [follows]=entailment [paraphrase]=similarity [next_sentence]=multiple_choice)
declare -A variants=(
    [pre-trained]=""
    [without_language_loss]="--language_weight=0"
    [frozen_trunk]="--freeze_trunk=True --learning_rate=1e-2"   # a head alone learns at a higher rate
    [embeddings_alone]="--transfer_blocks=0"
    [1_block]="--transfer_blocks=1"
    [2_blocks]="--transfer_blocks=2"
    [3_blocks]="--transfer_blocks=3"
    [from_scratch]="--from_scratch=True"
)
order="pre-trained without_language_loss frozen_trunk 3_blocks 2_blocks 1_block embeddings_alone from_scratch"

if [ ! -d data/gpt1_arc ]; then
    python "$repository/examples/gpt1_data.py" --output data/gpt1_arc
fi
if [ ! -f data/gpt1_text/meta.json ]; then
    python "$repository/prepare/tokenizer.py" --input data/gpt1_arc/corpus.jsonl --vocab_size 4096 --name gpt1_text
    python "$repository/prepare/text.py" --input data/gpt1_arc/corpus.jsonl --tokenizer gpt1_text --name gpt1_text --val_fraction 0.02
fi
if [ ! -f out/gpt1_mini/run.json ]; then
    python "$repository/train.py" "$repository/configs/gpt1_mini.toml" --out_dir=out/gpt1_mini
fi

for seed in $seeds; do
    for task in $tasks; do
        for variant in $order; do
            folder=out/gpt1_arc/$task/$variant/$seed
            if [ -f "$folder/report.json" ]; then continue; fi
            data=data/gpt1_arc/$task
            # shellcheck disable=SC2086  # several flags
            python "$repository/stages/finetune.py" out/gpt1_mini --task "${kinds[$task]}" \
                --train "$data/train.jsonl" --val "$data/val.jsonl" --test "$data/test.jsonl" \
                --epochs=10 --learning_rate=5e-4 --warmup=0.1 ${variants[$variant]} \
                --seed="$seed" --out_dir="$folder" --overwrite=True > "out/gpt1_arc.log" 2>&1 || { cat out/gpt1_arc.log; exit 1; }
            echo "$task, $variant, seed $seed: $(grep '^test:' out/gpt1_arc.log)"
            rm -rf "$folder"/step-* "$folder"/last "$folder"/best   # the report stays
        done
    done
done

python - out/gpt1_arc "$order" <<'PYTHON' | tee out/gpt1_arc/table.md
import json, statistics, sys
from pathlib import Path

root, order = Path(sys.argv[1]), sys.argv[2].split()
tasks = [task for task in ("package", "follows", "paraphrase", "next_sentence") if (root / task).is_dir()]
print("| test accuracy, % | " + " | ".join(tasks) + " |\n|---|" + "---|" * len(tasks))
for variant in order:
    cells = []
    for task in tasks:
        reports = [json.loads(path.read_text()) for path in sorted(root.glob(f"{task}/{variant}/*/report.json"))]
        values = [100 * report["test"]["accuracy"] for report in reports]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread} ({len(values)})" if values else "")
    print(f"| {variant.replace('_', ' ')} | " + " | ".join(cells) + " |")
PYTHON
