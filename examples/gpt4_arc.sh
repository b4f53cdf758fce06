#!/usr/bin/env bash
# GPT-4's other half: a model that answers questions about pictures, trained from nothing. It draws the pictures, trains a
# small text model on the questions, adds an image encoder and trains both, and asks about combinations of colour and
# shape that no training picture had, with the right pictures and, as a control, with shuffled ones. A second run
# continues where the first stopped.
#
#   bash examples/gpt4_arc.sh
#   EPOCHS=2 bash examples/gpt4_arc.sh     a shorter run
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
out=out/gpt4_arc
epochs=${EPOCHS:-12}

python "$repository/prepare/shapes.py"

if [ ! -e "$out/text/last" ]; then
    python "$repository/train.py" "$repository/examples/shapes_text.toml" --out_dir="$out/text"
fi

if [ -e "$out/seen/last" ]; then
    python "$repository/stages/sft.py" --resume="$out/seen"
else
    python "$repository/stages/sft.py" "$out/text" --train=data/shapes/train.jsonl --overwrite=True --out_dir="$out/seen" \
        --image_encoder="$repository/examples/shapes_encoder.toml" --epochs="$epochs" --batch_size=32 \
        --learning_rate=2e-3 --warmup=0.05 --residual_dropout=0 --val_fraction=0.01 --dtype=float32
fi

for items in test shuffled; do
    echo "$items pictures"
    python "$repository/stages/eval.py" "$out/seen" --chat=True --tasks "$repository/examples/shapes.toml" \
        --data "data/shapes/$items.jsonl" --json "$out/$items.json"
done
