"""BERT's objective in train.py, and what a model trained by it does afterwards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.decoding.gaps import GapFiller
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import entry_point
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, load_classifier, with_special_tokens
from gpt_arc.finetuning.examples import Columns, Example, SpecialTokens, sequences_of
from gpt_arc.training.log import read_metrics
from gpt_arc.weights.directory import load_model, save_model
from helpers import TEXT, TINY_FLAGS, randomised, trains_into, untimed, write
from model import GPT, GPTConfig
from stages import eval as evaluation
from stages import finetune, sft

BERT = ("--attention=bidirectional", "--norm_position=post", "--embedding_norm=True", "--head_transform=True")
FLAGS = (*TINY_FLAGS, *BERT, "--dropout=0.1", "--dtype=float32", "--compile=False")


@pytest.fixture
def train_into(workplace, output_of):
    return trains_into(output_of, FLAGS)


def test_a_resumed_run_equals_one_that_never_stopped(train_into, stage_runner):
    metrics, tensors = train_into("whole", "--objective=masked")
    train_into("halves", "--max_iters=4", "--lr_decay_iters=8")
    stage_runner(train, "--resume=halves", "--max_iters=8")
    resumed = load_file("halves/last/model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in tensors.items())
    assert untimed(read_metrics(Path("halves/metrics.jsonl")))[-1]["val_loss"] == metrics[-1]["val_loss"]


def test_micro_batches_add_up_and_the_loss_is_a_mean_over_scored_tokens(train_into):
    flags = ("--dropout=0", "--max_iters=1", "--warmup_iters=0")
    whole, tensors = train_into("whole", *flags, "--batch_size=4")
    parts, others = train_into("parts", *flags, "--batch_size=2", "--gradient_accumulation_steps=2")
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-6)
    losses = [[line["train_loss"] for line in lines if "train_loss" in line][0] for lines in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    characters = len(set(TEXT)) + 1
    assert losses[0] == pytest.approx(torch.tensor(characters).log().item(), abs=0.2)  # nothing is learned yet


def test_the_plan_says_what_is_predicted(workplace, output_of):
    flags = ("sums.toml", *FLAGS, "--dry_run=True")
    plan = output_of(entry_point(train.main), "train.py", *flags)
    assert "objective      masked: 12.5% of the tokens are predicted" in plan  # 2 of 16
    assert f"vocabulary     {len(set(TEXT)) + 1}, as in the dataset with a token to hide others" in plan
    assert "masked" not in output_of(entry_point(train.main), "train.py", "sums.toml", *TINY_FLAGS, "--dry_run=True")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--objective=masked",), "objective = masked contradicts attention = causal: it needs attention = bidir"),
        ((*BERT, "--objective=next"), "objective = next contradicts attention = bidirectional"),
        ((*BERT, "--sample_interval=5"), "sample_interval = 5 continues a text"),
        ((*BERT, "--mask_rate=0"), "mask_rate"),
        ((*BERT, "--attention_band=4"), "attention_band = 4"),
    ],
)
def test_what_contradicts_the_objective_is_refused(workplace, output_of, flags, message):
    assert message in output_of(entry_point(train.main), "train.py", "sums.toml", *TINY_FLAGS, *flags)


def test_a_dataset_without_a_tokenizer_cant_hide_tokens(workplace, output_of):
    next(Path("data/sums").glob("tokenizer.json")).unlink()
    message = output_of(entry_point(train.main), "train.py", "sums.toml", *FLAGS, "--vocab_size=40")
    assert "has no tokenizer" in message


def test_a_trained_model_fills_gaps_and_classifies(train_into, output_of, stage_runner):
    train_into("run", "--document_mask=False", "--max_iters=30", "--eval_interval=30", "--n_embd=32", "--dropout=0")
    filled = output_of(entry_point(sample.main), "sample.py", "run", "--start=2 times 3[MASK]is 6.", "--temperature=0")
    assert filled == "2 times 3 is 6.\n"
    line = json.loads(
        output_of(
            entry_point(sample.main), "sample.py", "run", "--start=2 [MASK]imes 3 [MASK]s 6.", "--json", "--top_k=1"
        )
    )
    first, second = line["text"][2], line["text"][10]
    assert line["text"] == f"2 {first}imes 3 {second}s 6." and len(line["log_probabilities"]) == 2
    assert load_model("run")[1].decode(line["tokens"]) == first + second
    write("rows.jsonl", [{"text": f"{n} times 2", "label": "odd" if n % 2 else "even"} for n in range(10, 40)])
    output = stage_runner(finetune, "run", "--train=rows.jsonl", "--device=cpu", "--epochs=1", "--out_dir=tuned")
    assert "language" not in json.dumps(json.loads(Path("tuned/report.json").read_text()))
    assert "val_accuracy" in output
    assert load_classifier("tuned")[0].trunk.config.attention == "bidirectional"
    assert "an LSTM in one" in stage_runner(finetune, "run", "--train=rows.jsonl", "--lstm=True").message


UNFIT = {
    name: f"--{name}={value}"
    for name, value in {
        **{"prefill": 4, "cache": "int8", "stop": "a", "draft": "base", "int8": True, "compile": True},
        **{"length_penalty": 2, "draft_tokens": 2, "repetition_penalty": 1.5},
    }.items()
}


@pytest.mark.parametrize(
    "main, flags, message",
    [
        (sample.main, ("sample.py", "base", "--start=2 times"), "write [MASK] where a token is missing"),
        (sample.main, ("sample.py", "base", "--start=[MASK]", "--num_beams=2"), "num_beams is for continuing a text"),
        (
            sample.main,
            ("sample.py", "base", f"--start={'2' * 30}[MASK]"),
            "31 tokens, and the model reads 16: shorten",
        ),
        *(
            (sample.main, ("sample.py", "base", "--start=[MASK]", flag), f"{name} is for continuing a text")
            for name, flag in UNFIT.items()
        ),
        (sample.main, ("sample.py", "base", "--start=ü[MASK]"), "not among"),
        (evaluation.main, ("eval.py", "base", "--tasks=addition_2"), "base reads a text in both directions"),
        (sft.main, ("sft.py", "base", "--train=chats.jsonl"), "base reads a text in both directions"),
        (
            finetune.main,
            ("finetune.py", "base", "--train=rows.jsonl", "--language_weight=0.5"),
            "leave language_weight",
        ),
    ],
)
def test_commands_that_continue_a_text_refuse_it(workplace, output_of, main, flags, message):
    tokenizer = CharTokenizer.from_text(TEXT)
    config = GPTConfig(16, tokenizer.vocab_size + 1, 1, 2, 8, attention="bidirectional")
    save_model(GPT(config), tokenizer, "base")
    write("chats.jsonl", [{"prompt": "2", "response": "3"}] * 8)
    write("rows.jsonl", [{"text": "2", "label": label} for label in "ab"] * 8)
    assert message in output_of(entry_point(main), *flags)


def test_the_most_certain_gap_is_filled_first():
    """Against the probabilities of the whole model, computed here."""
    tokenizer = CharTokenizer("abcdefgh")
    model = randomised(GPT(GPTConfig(8, 9, 1, 1, 8, attention="bidirectional")))
    filled = GapFiller(model, tokenizer, "model").fill("a[MASK]c[MASK]", Sampling(temperature=0), torch.Generator())
    tokens, expected = [0, 8, 2, 8], {}
    with torch.no_grad():
        for _ in range(2):
            logs = model(torch.tensor([tokens]))[0, :, :8].log_softmax(-1)
            place = max((p for p in (1, 3) if p not in expected), key=lambda p: logs[p].max())
            tokens[place], expected[place] = int(logs[place].argmax()), logs[place].max().item()
    assert filled.text == tokenizer.decode(tokens) and filled.tokens == [tokens[1], tokens[3]]
    assert filled.log_probabilities == pytest.approx([expected[1], expected[3]], abs=1e-5)


def test_the_classifier_reads_the_first_token_and_the_types_of_a_pair():
    config = GPTConfig(16, 12, 2, 2, 8, attention="bidirectional", token_types=2)
    classifier = Classifier(
        randomised(GPT(config)),
        ClassifierConfig("entailment", ("no", "yes"), SpecialTokens(9, 10, 10), Columns("a"), 16),
    ).eval()
    (sequence,), _ = sequences_of(
        Example(("ab", "c"), None, ""), "entailment", CharTokenizer("abc"), SpecialTokens(9, 10, 10), 16
    )
    assert sequence == [9, 0, 1, 10, 2, 10]  # [CLS] a b [SEP] c [SEP]
    padded = torch.tensor([[[*sequence, 5, 5]]])
    with torch.no_grad():
        outcome = classifier(padded, torch.tensor([[6]]), torch.tensor([1]))
        hidden = classifier.trunk.hidden(torch.tensor([sequence]), types=torch.tensor([[0, 0, 0, 0, 1, 1]]))
        torch.testing.assert_close(outcome.logits, classifier.head(hidden[:, 0]), rtol=1e-4, atol=1e-5)
    assert outcome.language_loss == 0


def test_a_tokenizer_with_berts_marks_needs_no_new_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from gpt_arc.data.tokenizer import load_tokenizer

    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "the", "cat", "sat"])}
    library = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    model = GPT(GPTConfig(16, 8, 1, 1, 8, attention="bidirectional"))
    same, special = with_special_tokens(model, tokenizer)
    assert same is model and special == (1, 2, 2)
    assert GapFiller(model, tokenizer, "model").encode("the [MASK] sat") == [1, 5, 3, 7, 2]
    assert with_special_tokens(GPT(GPTConfig(16, 8, 1, 1, 8)), tokenizer)[1] == (8, 9, 10)


def test_a_fitting_model_of_another_vocabulary_is_refused(workplace, output_of):
    save_model(GPT(GPTConfig(16, 5, 2, 2, 16, attention="bidirectional")), None, "base")
    message = output_of(entry_point(train.main), "train.py", "sums.toml", *TINY_FLAGS, "--init_from=base")
    assert "token" in message and load_model("base")[0].config.vocab_size == 5
