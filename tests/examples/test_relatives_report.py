"""The table of examples/relatives_arc.sh."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

import relatives_report
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.reading import read_json
from gpt_arc.weights.directory import save_model
from helpers import ROOT, randomised, write_dataset
from model import GPT, GPTConfig

LETTERS = CharTokenizer("abcdefgh")
TINY = GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8, positions="rotary")
SETTINGS = {
    "gpt": {},
    "bert": {"attention": "bidirectional"},
    "lstm": {"mixer": "lstm", "positions": "none"},
}


def model_of(name):
    return randomised(GPT(GPTConfig(**vars(TINY) | SETTINGS[name]))).eval()


@pytest.mark.parametrize("name", SETTINGS)
def test_hidden_tokens_are_predicted_one_at_a_time(name):
    model, windows = model_of(name), torch.randint(8, (5, 8), generator=torch.Generator().manual_seed(0))
    losses, hits = [], []
    for row in windows.tolist():
        for place in (2, 4, 6):
            if name != "bert":
                logits = model(torch.tensor([row[:place]]))[0, -1]
            else:
                logits = model(torch.tensor([[*row[:place], 8, *row[place + 1 :]]]))[0, place]
            losses.append(-logits.log_softmax(-1)[row[place]].item())
            hits.append(int(logits.argmax()) == row[place])
    loss, accuracy = relatives_report.hidden_tokens(model, windows, 8)
    assert loss == pytest.approx(sum(losses) / 15, rel=1e-5) and accuracy == pytest.approx(sum(hits) / 15)


def test_the_table_has_what_was_measured(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    main = entry_point(relatives_report.main)
    assert "has no results: run bash examples/relatives_arc.sh first" in output_of(main, "relatives_report.py")
    tokens = torch.randint(8, (100,), generator=torch.Generator().manual_seed(0)).numpy()
    write_dataset(Path("data/letters"), LETTERS, {"train": tokens, "val": tokens})
    for (number, name), seed in product(enumerate(SETTINGS), (1, 2)):
        folder = Path("out/relatives", name, str(seed))
        save_model(model_of(name), LETTERS, folder)
        line = {"step": 5, "val_loss": 2.0 + number + seed / 10, "tokens": 4096}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        for task in ("package", "related"):
            report = Path("out/relatives", task, name, str(seed), "report.json")
            report.parent.mkdir(parents=True)
            accuracy = 0.4 + (seed + number) / 10 if task == "package" else 0.8 - seed / 10
            report.write_text(json.dumps({"test": {"accuracy": accuracy}}))
    output = output_of(main, "relatives_report.py", "--dataset=letters")
    assert output == Path("out/relatives/table.md").read_text()
    assert output.startswith("| figure | GPT | BERT | LSTM |\n")
    counts = (sum(parameter.numel() for parameter in model_of(name).parameters()) for name in SETTINGS)
    assert f"| parameters | {' | '.join(f'{count:,}' for count in counts)} |\n" in output
    assert "| tokens read in pre-training | 4,096 | 4,096 | 4,096 |\n" in output
    assert "| of these scored, % | 100.0 | 12.5 | 100.0 |\n" in output
    assert "| val loss, nats a scored token | 2.150 ± 0.050 | 3.150 ± 0.050 | 4.150 ± 0.050 |\n" in output
    assert "| `package`, test accuracy, % (by chance 14) | 55.0 ± 5.0 | 65.0 ± 5.0 | 75.0 ± 5.0 |\n" in output
    assert "| `related`, test accuracy, % (by chance 50) | 65.0 ± 5.0 | 65.0 ± 5.0 | 65.0 ± 5.0 |\n" in output
    assert "| mean of these tasks | 60.0 ± 0.0 | 65.0 ± 0.0 | 70.0 ± 0.0 |\n" in output
    assert "follows" not in output
    assert Path("out/relatives/accuracy.png").stat().st_size > 4000


def test_the_page_has_the_figures_of_the_runs():
    figures = read_json(ROOT / "docs/results/relatives.json")
    assert relatives_report.table(figures) in (ROOT / "docs/results/relatives.md").read_text()
