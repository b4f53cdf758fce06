#!/usr/bin/env bash
# GPT-1's two stages on ten words: pre-training on five sentences, then fine-tuning on four reviews. It does with the
# scripts for models of every size what examples/numpy_gpt.py does by hand, in a quarter of a minute.
#
#   bash examples/toy_sentiment.sh
#   ONLY=data bash examples/toy_sentiment.sh  # prepare the data and stop
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # a model this small is slower on two cores

if [ ! -f data/toy/meta.json ]; then
    mkdir -p data/toy_words
    python - <<'PYTHON'
import json

words = ["<|endoftext|>", "the", "film", "was", "great", "terrible", "cat", "sat"]
tokenizer = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {word: id for id, word in enumerate(words)}, "unk_token": "[unknown]"},
}
sentences = ["the cat sat", "the film was great", "the film was terrible", "the cat was great", "the cat sat sat"]
reviews = {"the film was great": "positive", "the film was terrible": "negative",
           "the cat was great": "positive", "the cat was terrible": "negative"}
with open("data/toy_words/tokenizer.json", "w") as file:
    json.dump(tokenizer, file)
with open("data/toy_sentences.jsonl", "w") as file:
    file.writelines(json.dumps({"text": sentence}) + "\n" for sentence in 100 * sentences)
with open("data/toy_reviews.jsonl", "w") as file:
    file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in reviews.items())
PYTHON
    python "$repository/prepare/text.py" --input data/toy_sentences.jsonl --name toy --tokenizer toy_words --split tail
fi
if [ "${ONLY:-}" = data ]; then exit; fi
python "$repository/train.py" "$repository/configs/gpt1.toml" --dataset=toy --n_layer=2 --n_head=2 --n_embd=16 \
    --block_size=16 --dropout=0 --batch_size=32 --tokens_per_step=512 --max_iters=1000 --learning_rate=1e-2 --warmup_iters=20 \
    --eval_interval=1000 --log_interval=200 --document_mask=True --dtype=float32 --out_dir=out/toy
loss() {  # of a model on the sentences: a word given the words before it and that one follows
    python - "$1" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

from gpt_arc.weights.directory import load_model

model, tokenizer = load_model(sys.argv[1])
sentences = ["the cat sat", "the film was great", "the film was terrible", "the cat was great", "the cat sat sat"]
losses = []
for sentence in sentences:
    tokens = torch.tensor(tokenizer.encode("<|endoftext|> " + sentence))
    logits = model.eval()(tokens[None])[0, 1:-1, 1:]  # without the token that would end the sentence
    losses.append(F.cross_entropy(logits, tokens[2:] - 1, reduction="none"))
print(f"{sys.argv[1]}: {torch.cat(losses).mean():.4f} nats per word of the five sentences; the minimum is .4758")
PYTHON
}

loss out/toy
python "$repository/stages/finetune.py" out/toy --train data/toy_reviews.jsonl --val_fraction=0 --test data/toy_reviews.jsonl \
    --epochs=60 --learning_rate=1e-2 --dtype=float32 --out_dir=out/toy_sentiment --classify "the film was great"
loss out/toy_sentiment
