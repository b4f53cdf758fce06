#!/usr/bin/env bash
# In-context learning, shown twice without a network. A small GPT trains on documents that each use another mapping of
# letters, then applies mappings it has never seen, with 0 to 16 demonstrations in the prompt. A transformer on vectors
# predicts linear functions from examples as well as least squares does. docs/results/in_context.md discusses the results. A
# second run continues where the first stopped.
#
#   bash examples/in_context_arc.sh
#   PARTS=mappings bash examples/in_context_arc.sh            one part only; the other is linear
#   ONLY=data bash examples/in_context_arc.sh  # prepare the data and stop
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # models this small gain little from a second thread
parts=${PARTS:-mappings linear}
out=out/in_context_arc

if [[ $parts == *mappings* ]]; then
    if [ ! -d data/in_context ]; then
        python "$repository/examples/in_context_data.py" --output data/in_context
    fi
    if [ ! -f data/in_context_text/meta.json ]; then
        python "$repository/prepare/text.py" --input data/in_context/corpus.jsonl --name in_context_text \
            --tokenizer char --val_fraction 0.02
    fi
    if [ "${ONLY:-}" = data ]; then exit; fi
    if [ ! -e out/in_context/last ]; then
        python "$repository/train.py" "$repository/configs/in_context.toml" --out_dir=out/in_context
    elif ! grep -q '"step": 3000' out/in_context/metrics.jsonl; then
        python "$repository/train.py" --init_from=resume --out_dir=out/in_context
    fi

    # demonstrations must use the mapping in question, so each held-out mapping is a separate evaluation
    mkdir -p $out/results
    for folder in data/in_context/*/; do
        number=$(basename "$folder")
        for control in "" .shuffled; do
            if [ -f "$out/results/$number$control.json" ]; then continue; fi
            shuffled=$([ "$control" ] && echo True || echo False)
            python "$repository/stages/eval.py" out/in_context --tasks "$repository/examples/in_context.toml" \
                --data "${folder}items.jsonl" --train_data "${folder}pool.jsonl" --shots 0 1 2 4 8 16 \
                --shuffled_answers="$shuffled" --json "$out/results/$number$control.json" > /dev/null
        done
        echo "mapping $number evaluated"
    done
    python "$repository/examples/in_context_report.py" --data data/in_context --results $out/results
fi

if [[ $parts == *linear* && ! -f out/in_context_linear/figures.json ]]; then
    python "$repository/examples/in_context_linear.py" --output=out/in_context_linear
fi
