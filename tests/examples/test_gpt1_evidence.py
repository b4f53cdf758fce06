"""examples/gpt1_evidence.py: its runs are those of stages/finetune.py; its grid, its tables, and the command."""

import dataclasses
from pathlib import Path

import pytest
import torch

import gpt1_evidence
from gpt1_evidence import Options, Pretrained, Results
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.reading import read_json
from gpt_arc.weights.directory import load_text_model, save_model
from helpers import ROOT, randomised, write, write_dataset
from model import GPT, GPTConfig
from stages import finetune

LETTERS = CharTokenizer("abcdefgh")
TINY = GPTConfig(block_size=16, vocab_size=8, n_layer=2, n_head=2, n_embd=8, dropout=0.1)
LSTM = dataclasses.replace(TINY, mixer="lstm", positions="none")
ROWS = [{"text": "abcdefgh"[i % 7 :] + "ab" * (i % 3), "label": "xyz"[i % 3]} for i in range(48)]
FLAGS = "--model=base --dataset=letters --tasks package --labels 8 32 --transfer_labels=32 --examples=64".split()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a tiny model, text and labelled examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt1_evidence, "resolve_dtype", lambda setting, device: "float32")
    save_model(randomised(GPT(TINY)), LETTERS, "base")
    tokens = torch.randint(8, (100,), generator=torch.Generator().manual_seed(0)).numpy()
    write_dataset(Path("data/letters"), LETTERS, {"train": tokens, "val": tokens})
    for split in ("train", "test"):
        Path("data/gpt1_labels/package").mkdir(parents=True, exist_ok=True)
        write(f"data/gpt1_labels/package/{split}.jsonl", ROWS)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "weight", "blocks", "flag"),
    [
        (TINY, 0.0, 1, "--transfer_blocks=1"),
        (TINY, 0.5, 2, "--transfer_blocks=2"),
        (TINY, 0.0, None, "--from_scratch=True"),
        (LSTM, 0.5, 2, "--transfer_blocks=2"),
    ],
    ids=["a block", "everything", "nothing", "a pre-trained LSTM"],
)
def test_a_run_is_that_of_the_stage(config, weight, blocks, flag, workplace, stage_runner):
    save_model(randomised(GPT(config)), LETTERS, "base")
    model, tokenizer = load_text_model("base")
    base = Pretrained(model, tokenizer, torch.zeros(1, 17, dtype=torch.long))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = Options(examples=96, learning_rate=1e-2)
    result = gpt1_evidence.finetune(options, base, "package", 32, weight, blocks, seed=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    write("drawn.jsonl", gpt1_evidence.drawn(ROWS, 32, 3))
    flags = ["base", "--train=drawn.jsonl", "--test=data/gpt1_labels/package/test.jsonl", "--val_fraction=0"]
    flags += ["--seed=3", "--epochs=3", "--learning_rate=1e-2", "--warmup=0.1", "--device=cpu", "--dtype=float32"]
    stage_runner(finetune, *flags, f"--language_weight={weight}", flag, "--out_dir=out/run")
    trunk, _ = load_text_model("out/run")
    assert result["accuracy"] == read_json(Path("out/run/report.json"))["test"]["accuracy"]
    loss = pytest.approx(base.loss_of(trunk.eval(), torch.device("cpu"), "float32"), rel=1e-6)
    assert result.get("loss") == (loss if blocks == 2 else None)  # otherwise the head is new


def test_the_loss_is_among_the_tokens_of_pre_training():
    model = randomised(GPT(TINY)).eval()
    windows = torch.randint(8, (40, 17), generator=torch.Generator().manual_seed(0))
    cpu, base = torch.device("cpu"), Pretrained(model, LETTERS, windows)
    total = model(windows[:, :-1], windows[:, 1:]).total.item()
    assert base.loss_of(model, cpu, "float32") == pytest.approx(total / (40 * 16), rel=1e-5)
    larger, _ = gpt1_evidence.with_special_tokens(model)
    assert base.loss_of(larger.eval(), cpu, "float32") == pytest.approx(total / (40 * 16), rel=1e-5)


def test_a_seed_draws_nested_labels():
    rows = [str(i) for i in range(100)]
    few, many = (gpt1_evidence.drawn(rows, labels, seed=1) for labels in (10, 60))
    assert many[:10] == few and len(set(many)) == 60
    assert sorted(gpt1_evidence.drawn(rows, 100, seed=1)) == sorted(rows) and few != rows[:10]
    assert gpt1_evidence.drawn(rows, 10, seed=2) != few


def test_the_grid():
    options = Options(tasks=("package",), labels=(5, 9), transfer_labels=9, seeds=2)
    cases = gpt1_evidence.grid(options, 3)
    shapes = [(case["labels"], case["language_weight"], case["blocks"]) for case in cases if case["seed"] == 1]
    curves = [(5, 0.0, 3), (5, 0.5, 3), (9, 0.0, 3), (9, 0.5, 3)]
    assert shapes == [*curves, (9, 0.0, None), (9, 0.0, 0), (9, 0.0, 1), (9, 0.0, 2)]  # (9, 0, 3) is a point of both
    assert [case["seed"] for case in cases] == [1] * 8 + [2] * 8


def test_the_tables_compare_seed_by_seed():
    case = {"task": "package", "labels": 9, "blocks": 1}
    accuracies = {(0.0, 1): 0.5, (0.0, 2): 0.6, (0.5, 1): 0.52, (0.5, 2): 0.66}
    runs = [
        case | {"language_weight": weight, "seed": seed, "accuracy": accuracy, "loss": 2 + weight}
        for (weight, seed), accuracy in accuracies.items()
    ]
    runs.append(case | {"language_weight": 0.0, "blocks": None, "seed": 1, "accuracy": 0.25})
    assert (
        Results(1.5, 1, 9, runs).tables()
        == """\
| test accuracy, % | 9 labels |
|---|---|
| `package`, task's loss alone | 55.0 ± 5.0 |
| `package`, and language-model loss | 59.0 ± 7.0 |
| what that gains | 4.0 ± 2.0 |

| transferred | `package` |
|---|---|
| nothing | 25.0 |
| everything | 55.0 ± 5.0 |

| loss on the text of pre-training | 9 labels |
|---|---|
| `package`, task's loss alone | 2.000 ± 0.000 |
| `package`, and language-model loss | 2.500 ± 0.000 |"""
    )


def test_the_command_continues(workplace, output_of):
    main, file = entry_point(gpt1_evidence.main), Path("out/gpt1_evidence/figures.json")
    output_of(main, "gpt1_evidence.py", *FLAGS, "--seeds=1")
    first = read_json(file)["runs"]
    assert len(first) == 4 + 3 and sum("loss" in run for run in first) == 4
    output = output_of(main, "gpt1_evidence.py", *FLAGS, "--seeds=2")
    runs = read_json(file)["runs"]
    assert runs[:7] == first and len(runs) == 14
    assert Path("out/gpt1_evidence/tables.md").read_text() in output
    assert Path("out/gpt1_evidence/evidence.png").stat().st_size > 8000


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--labels", "8", "5000"], "has 48 labels, not 5000: python examples/gpt1_data.py --output=data/gpt1_labels"),
        (["--tasks", "sentiment"], "tasks: 'sentiment' is none of package, follows, related, next_sentence"),
        (["--model=out/none"], "out/none"),
    ],
)
def test_mistakes_are_refused(flags, reason, workplace, output_of):
    refused = output_of(entry_point(gpt1_evidence.main), "gpt1_evidence.py", *FLAGS, "--seeds=1", *flags)
    assert reason in refused


def test_the_page_has_the_figures_of_the_run():
    page, report = (ROOT / "docs/results/gpt1_arc.md").read_text(), read_json(ROOT / "docs/results/gpt1_evidence.json")
    settings = report["settings"]
    results = Results(settings["loss before"], settings["blocks"], settings["transfer_labels"], report["runs"])
    for table in results.tables().split("\n\n"):
        assert table in page
    assert f"to a loss of {results.before:.3f} on the val split" in page
