#!/usr/bin/env bash
# GPT-4's other half: models that answer questions about pictures, trained from nothing. For each task it prepares the
# pictures; trains an image encoder to classify them and a text model on the questions; joins the two by a projector and
# trains all three, the encoder more slowly; and asks the test's questions, about the right pictures and, as a control,
# about shuffled ones.
# docs/results/gpt4_arc.md discusses the results. A second run continues where the first stopped. It writes
# out/gpt4_arc/table.md and, for each task, answers.png: questions, pictures, answers and where the model looks.
#
#   bash examples/gpt4_arc.sh
#   TASKS=digits bash examples/gpt4_arc.sh     one of the tasks: shapes, digits, words
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
tasks=${TASKS:-shapes digits words}

train() {  # folder, script and its arguments: a new run, or a stopped or finished one that goes on
    local folder=$1 script=$2
    shift 2
    if [ -e "$folder/last" ]; then
        python "$repository/$script" --resume="$folder"
    else
        python "$repository/$script" "$@" --overwrite=True --out_dir="$folder"
    fi
}

always=(--warmup=0.05 --weight_decay=0.1 --residual_dropout=0 --val_fraction=0.02 --dtype=float32)

for task in $tasks; do
    out=out/gpt4_arc/$task data=data/$task
    case $task in
        shapes)
            labels="colour shape quarter" tests="test pairs shuffled" classes="--epochs=3 --learning_rate=2e-3"
            chats="--epochs=5 --learning_rate=2e-3 --batch_size=64 --encoder_rate=0.3"
            ;;
        digits)
            labels=label tests="test shuffled" classes="--epochs=4 --learning_rate=2e-3"
            chats="--epochs=8 --learning_rate=2e-3 --batch_size=64 --encoder_rate=0.1"
            ;;
        words)
            labels="first second third fourth fifth" tests="test shuffled" classes="--epochs=4 --learning_rate=4e-3"
            chats="--epochs=1 --learning_rate=4e-3 --batch_size=32 --encoder_rate=0.1"
            ;;
        *) echo "unknown task $task" >&2; exit 1 ;;
    esac
    mkdir -p "$out"
    python "$repository/prepare/$task.py"

    # shellcheck disable=SC2086  # several labels and flags are several arguments
    train "$out/encoder" stages/pretrain_encoder.py --image_encoder="$repository/examples/${task}_encoder.toml" \
        --train="$data/labels.jsonl" --labels $labels $classes --dtype=float32
    train "$out/text" train.py "$repository/examples/pictures_text.toml" --dataset="${task}_text"

    model=("$out/text" --image_encoder="$out/encoder")
    if [ "$task" = shapes ]; then  # descriptions keep the patches' features apart and teach to look things up
        train "$out/described" stages/sft.py "${model[@]}" --train="$data/descriptions.jsonl" --epochs=2 \
            --learning_rate=3e-3 --batch_size=32 "${always[@]}"
        model=("$out/described")
    fi
    # shellcheck disable=SC2086
    train "$out/seen" stages/sft.py "${model[@]}" --train="$data/train.jsonl" $chats "${always[@]}"

    for items in $tests; do
        echo "$task, $items"
        python "$repository/stages/eval.py" "$out/seen" --chat=True --tasks "$repository/examples/pictures.toml" \
            --data "$data/$items.jsonl" --json "$out/$items.json"
    done
done

python "$repository/examples/gpt4_report.py" --results out/gpt4_arc
