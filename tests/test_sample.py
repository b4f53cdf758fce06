"""sample.py as a user runs it, with a model whose continuations are known."""

import time

import pytest
import torch

import sample
from conftest import command
from gpt_arc.checkpoint import save_model
from gpt_arc.errors import entry_point
from gpt_arc.tokenizer import CharTokenizer
from model import GPT, GPTConfig

LETTERS = "\nabcdefgh"


def counting_model(vocab: int, block_size: int) -> GPT:
    """A real GPT that says the token after the last one: embeddings are unit vectors, the head shifts them by one."""
    model = GPT(GPTConfig(block_size, vocab, 1, 1, vocab, head_size=2, positions="rotary", tied_head=False, bias=False))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        model.token_embedding.weight.copy_(torch.eye(vocab))
        model.head.weight.copy_(50 * torch.eye(vocab).roll(1, dims=0))
    return model


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A model directory, out/letters/last, that recites the alphabet a to h, then starts a new line."""
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "out" / "letters" / "step-00000001"
    save_model(counting_model(len(LETTERS), 4), CharTokenizer(LETTERS), step)
    (step.parent / "last").symlink_to(step.name)
    return step


@pytest.fixture
def say(output_of):
    return lambda *args: output_of(entry_point(sample.main), "sample.py", *args)


GREEDY = ("--temperature=0", "--max_new_tokens=5")


def test_every_way_to_name_the_model(letters, say):
    for args in ((), ("out/letters",), (str(letters),), ("--out_dir=out/letters",), ("--init_from=out/letters",)):
        assert say(*args, *GREEDY, "--start=ab") == "abcdefg\n"


def test_the_newest_run_is_taken(letters, say, tmp_path):
    newer = tmp_path / "out" / "letters-2" / "step-00000001"
    save_model(counting_model(3, 4), CharTokenizer("xyz"), newer)
    time.sleep(0.02)
    (newer.parent / "last").symlink_to(newer.name)
    assert say(*GREEDY, "--start=x") == "xyzxyz\n"


def test_prompts(letters, say, tmp_path):
    (tmp_path / "prompt.txt").write_text("cd")
    assert say(*GREEDY, "--start=FILE:prompt.txt") == "cdefgh\n\n"
    assert say(*GREEDY, "--start=") == "abcde\n"  # an empty prompt begins after a newline
    assert say(*GREEDY) == "abcde\n"
    assert say(*GREEDY, "--start=hhhhhhhhhha") == "hhhhhhhhhhabcdef\n"  # longer than the context of 4


def test_a_long_prompt_says_so(letters):
    result = command("sample.py", *GREEDY, "--start=hhhhhhhhhha")
    assert "the prompt's last 4 of 11 tokens are kept" in result.stderr and result.returncode == 0


def test_several_samples_and_stops(letters, say):
    line = "-" * 15
    assert say(*GREEDY, "--num_samples=2", "--start=a") == f"abcdef\n{line}\nabcdef\n"
    assert say("--temperature=0", "--stop=fg", "--start=a") == "abcde\n"
    assert say("--temperature=0", "--stop=\n", "--start=a") == "abcdefgh\n"
    assert say("--max_new_tokens=0", "--start=a") == "a\n"
    for filters in ("--top_k=1", "--top_p=0.5"):
        assert say(filters, "--temperature=1.0", "--max_new_tokens=5", "--start=a") == "abcdef\n"


def test_the_seed_decides(letters, say):
    flags = ("--temperature=60", "--max_new_tokens=40", "--start=a")
    first = say(*flags)
    assert first == say(*flags) and first != say(*flags, "--seed=2")
    assert set(first) <= set(LETTERS)


def test_precision_and_compilation(letters, say):
    assert say(*GREEDY, "--start=ab", "--dtype=bfloat16") == "abcdefg\n"
    assert say(*GREEDY, "--start=ab", "--device=cpu", "--dtype=float32") == "abcdefg\n"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--start=aXb"], "the prompt 'aXb': the character 'X' (U+0058) at position 1"),
        (["nowhere"], "there is no model directory nowhere"),
        (["out"], "out is not a model directory"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt can't be read"),
        (["--temperature=-1"], "temperature = -1.0 must be 0 (greedy) or more"),
        (["--top_k=0"], "top_k = 0"),
        (["--top_p=1.5"], "top_p = 1.5"),
        (["--num_samples=0"], "num_samples = 0"),
        (["--max_new_tokens=-1"], "max_new_tokens = -1"),
        (["--stop="], "stop is an empty text"),
        (["--tempratur=1"], "did you mean --temperature"),
        (["out/letters", "--out_dir=x"], "named more than once"),
        (["--device=cuda"], "is not available here"),
    ],
)
def test_mistakes_are_one_sentence(letters, say, args, sentence):
    assert sentence in say(*args)


def test_no_run_and_no_tokenizer(letters, say, tmp_path):
    (letters / "tokenizer.json").unlink()
    assert "has no tokenizer, so" in say()
    (letters.parent / "last").unlink()
    assert "train one first" in say()
