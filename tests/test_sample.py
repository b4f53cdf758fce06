"""sample.py as a user runs it, with a model whose continuations are known."""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

import sample
from gpt_arc.chat.format import ChatFormat, Template, Turn
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.decoding import generate as generate_module
from gpt_arc.decoding import load as load_module
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.load import resolve_decoding_compile, resolve_decoding_dtype
from gpt_arc.errors import entry_point
from gpt_arc.weights.directory import load_model, save_model
from helpers import ROOT, command
from model import GPT, GPTConfig
from stub_models import counting_model
from warm import WarmPopen

LETTERS = "\nabcdefgh"


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A model directory, out/letters/last; the model recites the alphabet from a to h, then starts a new line."""
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


def test_the_newest_run_is_the_default(letters, say, tmp_path):
    newer = tmp_path / "out" / "letters-2" / "step-00000001"
    save_model(counting_model(3, 4), CharTokenizer("xyz"), newer)
    time.sleep(0.02)
    (newer.parent / "last").symlink_to(newer.name)
    assert say(*GREEDY, "--start=x") == "xyzxyz\n"


def test_prompts(letters, say, tmp_path):
    (tmp_path / "prompt.txt").write_text("cd")
    assert say(*GREEDY, "--start=FILE:prompt.txt") == "cdefgh\n\n"
    for ending in ("\n", "\r\n"):  # which an editor puts there
        (tmp_path / "prompt.txt").write_bytes(b"cd" + ending.encode())
        assert say(*GREEDY, "--start=FILE:prompt.txt") == "cdefgh\n\n"
    (tmp_path / "prompt.txt").write_text("ab\n\n")
    assert say(*GREEDY, "--start=FILE:prompt.txt") == "ab\nabcde\n"
    assert say(*GREEDY, "--start=") == "abcde\n"  # an empty prompt begins after a newline
    assert say(*GREEDY) == "abcde\n"
    assert say(*GREEDY, "--start=hhhhhhhhhha") == "hhhhhhhhhhabcdef\n"  # longer than the context of 4


def test_cutting_a_long_prompt_is_reported(letters):
    result = command("sample.py", *GREEDY, "--start=hhhhhhhhhha")
    assert "keeping the last 4 of the prompt's 11 tokens" in result.stderr and result.returncode == 0


def test_several_samples_and_stops(letters, say):
    line = "-" * 15
    assert say(*GREEDY, "--num_samples=2", "--start=a") == f"abcdef\n{line}\nabcdef\n"
    assert say("--temperature=0", "--stop=fg", "--start=a") == "abcde\n"
    assert say("--temperature=0", "--stop=\n", "--start=a") == "abcdefgh\n"
    assert say("--max_new_tokens=0", "--start=a") == "a\n"
    for filters in ("--top_k=1", "--top_p=0.5"):
        assert say(filters, "--temperature=1.0", "--max_new_tokens=5", "--start=a") == "abcdef\n"


@pytest.mark.parametrize("cache", ["auto", "bfloat16", "int8"])
def test_a_smaller_cache_and_a_prompt_in_parts(letters, say, cache):
    assert say(*GREEDY, f"--cache={cache}", "--prefill=2", "--start=abc") == "abcdefgh\n"


def test_samples_depend_on_the_seed(letters, say):
    flags = ("--temperature=60", "--max_new_tokens=40", "--start=a")
    text = say(*flags)
    assert text == say(*flags) and text != say(*flags, "--seed=2")
    assert set(text) <= set(LETTERS)


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
        (["--temperature=-1"], "temperature = -1 must be at least 0"),
        (["--top_k=0"], "top_k = 0"),
        (["--top_p=1.5"], "top_p = 1.5"),
        (["--num_samples=0"], "num_samples = 0"),
        (["--max_new_tokens=-1"], "max_new_tokens = -1"),
        (["--stop="], "--stop is empty"),
        (["--tempratur=1"], "did you mean --temperature"),
        (["--model=out/letters"], "there is no flag --model: write the model first, without a name"),
        (["out/letters", "--out_dir=x"], "named more than once"),
        (["--device=cuda"], "is not available here"),
        (["--min_p=0"], "min_p = 0 must be between 0 and 1, 0 excluded"),
        (["--min_p=1.5"], "min_p = 1.5"),
        (["--repetition_penalty=0"], "repetition_penalty = 0 must be between 0.01 and 100"),
        (["--repetition_penalty=-2"], "repetition_penalty = -2"),
        (["--batch_size=0"], "batch_size = 0"),
        (["--seed=-1"], "seed = -1"),
        (["--start=a", "--prompts=some.txt"], "both start and prompts say where prompts come from"),
        (["--start=a", "--interactive=True"], "both start and interactive"),
        (["--prompts=some.txt", "--interactive=True"], "both prompts and interactive"),
        (["--prompts=nowhere.txt"], "nowhere.txt can't be read"),
        (["--prompts=empty.txt"], "empty.txt holds no prompts"),
        (["--num_beams=2", "--top_k=3"], "num_beams draws nothing, so top_k has no meaning"),
        (["--num_beams=2", "--top_p=0.5"], "top_p has no meaning"),
        (["--num_beams=2", "--min_p=0.5"], "min_p has no meaning"),
        (["--num_beams=2", "--repetition_penalty=1.1"], "repetition_penalty has no meaning"),
        (["--num_beams=2", "--draft=out/letters"], "leave draft or num_beams out"),
        (["--num_beams=2", "--num_samples=3"], "num_samples = 3 is more than num_beams = 2"),
        (["--num_beams=0"], "num_beams = 0"),
        (["--num_beams=2", "--length_penalty=-1"], "length_penalty = -1"),
        (["--draft=nowhere"], "there is no model directory nowhere"),
        (["--draft=out/letters", "--draft_tokens=0"], "draft_tokens = 0"),
        (["--int8=True", "--compile=True", "--num_samples=2"], "int8 is for one row at a time"),
        (["--int8=True", "--compile=False"], "int8 is for one row at a time"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(letters, say, args, sentence):
    (letters.parents[2] / "empty.txt").touch()
    assert sentence in say(*args)


def test_no_run_and_no_tokenizer(letters, say, tmp_path):
    for name in ("tokenizer.json", "manifest.json"):
        (letters / name).unlink()
    assert "has no tokenizer, so it can't read text" in say()
    (letters.parent / "last").unlink()
    assert "train one first" in say()


# ---- several prompts, and JSON


def answers(text):
    return [json.loads(line) for line in text.splitlines()]


def test_json_has_tokens_log_probabilities_and_times(letters, say):
    flags = ("--json=True", "--start=ab", "--temperature=30", "--top_k=5", "--max_new_tokens=30")
    results = answers(say(*flags, "--num_samples=3"))
    assert len({result["text"] for result in results}) == 3
    tokenizer = CharTokenizer(LETTERS)
    model = load_model(letters)[0].eval()
    for result in results:
        assert result.keys() == {
            "prompt", "text", "tokens", "log_probabilities", "ended", "first_token_seconds", "seconds",
            "tokens_per_second",
        }  # fmt: skip
        assert result["prompt"] == "ab" and tokenizer.decode(result["tokens"]) == result["text"] and not result["ended"]
        text = tokenizer.encode("ab") + result["tokens"]
        with torch.no_grad():  # the model predicts from the last token alone
            logs = model(torch.tensor(text)[:, None])[:, 0].log_softmax(-1)
        expected = [logs[i, text[i + 1]].item() for i in range(1, len(text) - 1)]
        assert result["log_probabilities"] == pytest.approx(expected, abs=1e-4)
        assert 0 < result["first_token_seconds"] < result["seconds"]
        assert result["tokens_per_second"] == pytest.approx(30 / result["seconds"])
    assert answers(say(*flags, "--num_samples=1"))[0]["text"] == results[0]["text"]


def test_json_of_a_text_that_ends(letters, say):
    (result,) = answers(say("--json=True", "--temperature=0", "--stop=de", "--start=a"))
    assert (result["text"], result["ended"], result["tokens"]) == ("bc", True, CharTokenizer(LETTERS).encode("bcde"))
    (result,) = answers(say("--json=True", "--max_new_tokens=0", "--start=a"))
    assert result["tokens"] == result["log_probabilities"] == [] and result["seconds"] is None


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_each_line_of_a_file_is_a_prompt_and_may_be_blank(letters, say, tmp_path, end):
    lines = ["ab", "", "fgh", "a" * 9]
    for final_end in ("", end):
        (tmp_path / "prompts.txt").write_bytes((end.join(lines) + final_end).encode())
        results = answers(say("--prompts=prompts.txt", "--json=True", *GREEDY))
        assert [result["prompt"] for result in results] == lines
        assert [result["text"] for result in results] == ["cdefg", "abcde", "\nabcd", "bcdef"]
    text = say("--prompts=prompts.txt", "--num_samples=2", "--batch_size=3", *GREEDY)
    parts = text.removesuffix("\n").split("\n" + "-" * 15 + "\n")
    assert parts == [part for part in ("abcdefg", "abcde", "fgh\nabcd", "a" * 9 + "bcdef") for _ in range(2)]


def test_a_prompt_with_an_unknown_character_in_a_file_is_refused(letters, say, tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\naXb\n")
    refused = say("--prompts=prompts.txt", *GREEDY)
    assert "prompts.txt, line 2: the prompt 'aXb': the character 'X' (U+0058) at position 1" in refused


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_the_batch_size_changes_nothing(letters, say, tmp_path, batch_size):
    (tmp_path / "prompts.txt").write_text("a\nbcd\n\n")
    flags = ("--prompts=prompts.txt", "--num_samples=3", "--temperature=30", "--stop=a", "--max_new_tokens=25")
    texts = say(*flags, "--seed=3")
    assert say(*flags, "--seed=3", f"--batch_size={batch_size}") == texts != say(*flags, "--seed=4")


# ---- beams and drafts


def test_beams(letters, say):
    assert say("--num_beams=3", "--max_new_tokens=5", "--start=ab") == "abcdefg\n"
    results = answers(say("--num_beams=3", "--num_samples=3", "--max_new_tokens=4", "--start=ab", "--json=True"))
    sums = [sum(result["log_probabilities"]) for result in results]
    assert results[0]["text"] == "cdef" and sums == sorted(sums, reverse=True)
    assert len({result["text"] for result in results}) == 3
    assert all(CharTokenizer(LETTERS).decode(result["tokens"]) == result["text"] for result in results)
    assert all(0 < result["first_token_seconds"] <= result["seconds"] for result in results)
    assert "leave stop or num_beams out" in say("--num_beams=2", "--stop=e")


def test_beams_end_at_end_of_text(tmp_path, monkeypatch, say):
    monkeypatch.chdir(tmp_path)
    tokenizer = BPETokenizer.train([], 257)
    model = counting_model(257, 8)
    with torch.no_grad():  # "b" is followed by end-of-text
        model.head.weight[tokenizer.end_of_text] = 60 * torch.eye(257)[tokenizer.encode("b")[0]]
    save_model(model, tokenizer, tmp_path / "bytes")
    for flags in (("--num_beams=2",), ("--temperature=0",), ("--temperature=0", "--draft=bytes")):
        (result,) = answers(say("bytes", "--start=`", "--json=True", "--max_new_tokens=9", *flags))
        assert result["text"] == "ab" and result["ended"] and result["tokens"][-1] == tokenizer.end_of_text
        assert say("bytes", "--start=`", "--max_new_tokens=9", *flags) == "`ab\n"


def test_a_draft(letters, say, tmp_path):
    for flags in (("--temperature=0",), ("--temperature=0", "--draft_tokens=1"), ("--top_k=1", "--stop=h")):
        expected = say(*flags, "--start=ab", "--max_new_tokens=12")
        assert say(*flags, "--start=ab", "--max_new_tokens=12", "--draft=out/letters") == expected
    result = command("sample.py", "--temperature=0", "--max_new_tokens=11", "--start=a", "--draft=out/letters")
    assert result.stdout == "abcdefgh\nabc\n" and " proposed tokens were accepted\n" in result.stderr
    accepted, proposed = [int(word) for word in result.stderr.splitlines()[-1].split() if word.isdigit()]
    assert accepted == proposed > 0
    save_model(counting_model(len(LETTERS), 4), CharTokenizer("\nabcdefgi"), tmp_path / "other")
    assert "the draft other has another tokenizer than the model" in say("--draft=other")
    scaling = {"positions": "rotary", "rotary_scaling": "dynamic", "rotary_factor": 2.0, "rotary_context": 4}
    save_model(GPT(GPTConfig(4, len(LETTERS), 1, 1, 8, **scaling)), CharTokenizer(LETTERS), tmp_path / "stretched")
    refused = command("sample.py", "stretched", "--draft=out/letters")
    assert refused.returncode == 2 and refused.stdout == "" and "sample.py: with rotary_scaling" in refused.stderr
    flags = ("--temperature=30", "--num_samples=3", "--json=True", "--draft=out/letters", "--max_new_tokens=40")
    results = answers(say(*flags))
    assert len({answer["text"] for answer in results}) == 3 and say(*flags, "--seed=7") != say(*flags)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
@pytest.mark.slow
def test_compiled_and_8_bit_decoding(letters, say, tmp_path):
    assert say(*GREEDY, "--start=ab", "--compile=True") == "abcdefg\n"
    assert say(*GREEDY, "--start=ab", "--compile=True", "--int8=True") == "abcdefg\n"
    assert say(*GREEDY, "--start=ab", "--compile=True", "--num_samples=2") == f"abcdefg\n{'-' * 15}\nabcdefg\n"


# ---- streaming and prompts from standard input

SAMPLE = [sys.executable, str(ROOT / "sample.py"), "--device=cpu", "--compile=False", "--temperature=0"]


def read_until(descriptor, end, seconds=60):
    """Reads up to and including the bytes `end`, or more."""
    output, deadline = b"", time.monotonic() + seconds
    os.set_blocking(descriptor, False)
    while end not in output:
        assert time.monotonic() < deadline, output
        try:
            output += os.read(descriptor, 1 << 16)
        except BlockingIOError:
            time.sleep(0.01)
    return output


def test_text_is_streamed(letters):
    process = WarmPopen([*SAMPLE, "--start=ab", "--max_new_tokens=1000000"], stdout=subprocess.PIPE)
    try:
        output = read_until(process.stdout.fileno(), b"abcdefgh\nabc")
        assert process.poll() is None and len(output) < 4_000  # less than a buffer holds
        read_until(process.stdout.fileno(), b"abcdefgh\nabc")
    finally:
        process.kill()
        process.communicate()


def test_prompts_from_a_pipe(letters):
    typed = "ab\n\naXb\ncd\nfgh"
    result = command("sample.py", *GREEDY, "--interactive=True", "--device=cpu", input=typed)
    assert result.returncode == 0 and result.stdout == "abcdefg\nabcde\ncdefgh\n\nfgh\nabcd\n"
    assert "the prompt 'aXb': the character 'X' (U+0058) at position 1" in result.stderr
    assert result.stderr.count("\n") == 2 and "> " not in result.stdout  # the first line names the model


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("way", ["--interactive=True", "--chat=talker"])
def test_ctrl_c_ends_a_continuation_and_ctrl_d_the_program(talker, way):
    import pty

    model = counting_model(len(LETTERS) + 1, 40)
    with torch.no_grad():  # the last letter is followed by the first instead of the end
        model.head.weight[[0, -1]] = model.head.weight[[-1, 0]]
    save_model(model, CharTokenizer(LETTERS), talker)

    controller, terminal = pty.openpty()

    python, script, *flags = SAMPLE
    attached = "import os, runpy, sys; os.login_tty(os.dup(0)); del sys.argv[0]; "
    attached += "runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [python, "-c", attached, script, *flags, way, "--max_new_tokens=1000000"]
    process = WarmPopen(arguments, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    try:
        read_until(controller, b"> ")
        for prompt in (b"ab", b"f"):
            os.write(controller, prompt + b"\n")
            read_until(controller, b"defgh\r\nabcdefgh\r\nabc")
            os.write(controller, b"\x03")
            assert b"Traceback" not in read_until(controller, b"> ")
            assert process.poll() is None
        os.write(controller, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


# ---- a conversation

CHAT = ChatFormat(Template(*["{content}"] * 2, "{content}<|end|>"), CharTokenizer(LETTERS), {"<|end|>": len(LETTERS)})


@pytest.fixture
def talker(letters, tmp_path):
    """A chat model, talker, that answers with the rest of the alphabet: "gh" to "f"."""
    save_model(counting_model(len(LETTERS) + 1, 40), CharTokenizer(LETTERS), tmp_path / "talker")
    CHAT.save(tmp_path / "talker")
    return tmp_path / "talker"


@pytest.fixture
def talk(talker, say, monkeypatch):
    """Types lines and the end of input; returns the output and the prompts that the model continued."""
    read, called = [], generate
    monkeypatch.setattr(
        generate_module,
        "generate",
        lambda model, prompts, *a, **k: read.extend(prompts) or called(model, prompts, *a, **k),
    )

    def call(typed, *args):
        read.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return say("--chat", "talker", "--temperature=0", *args), read

    return call


def exchange(*contents):
    return [Turn(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]


def test_a_chat_continues_from_all_earlier_turns(talk):
    shown, read = talk("f\nae\nh\n\nbg")
    assert shown == "gh\nfgh\n\n\nabcdefgh\nh\n"  # an empty question follows an answer's end token
    contents = ["f", "gh", "ae", "fgh", "h", "", ""]
    assert read[:4] == [CHAT.prompt(exchange(*contents[:n])) for n in (1, 3, 5, 7)] and len(read) == 5
    shown, read = talk("f\nae", "--system=abc")
    assert shown == "gh\nfgh\n" and read[1] == CHAT.prompt([Turn("system", "abc"), *exchange("f", "gh", "ae")])


def test_an_answer_ends_at_its_end_token_the_stop_text_or_max_new_tokens(talk):
    assert talk("a\n")[0] == "bcdefgh\n"
    shown, read = talk("a\nb\n", "--max_new_tokens=3")
    assert shown == "bcd\ncde\n" and read[1] == CHAT.prompt(exchange("a", "bcd", "b"))
    shown, read = talk("a\nb\n", "--stop=fg")
    assert shown == "bcde\ncde\n" and read[1] == CHAT.prompt(exchange("a", "bcde", "b"))
    assert talk("a\nb\n", "--draft=talker")[0] == "bcdefgh\ncdefgh\n"


def test_a_chat_in_json_and_sampled(talk):
    results = answers(talk("a\nf\n", "--json=True", "--max_new_tokens=3")[0])
    texts = [(result["prompt"], result["text"], result["ended"]) for result in results]
    assert texts == [("a", "bcd", False), ("f", "gh", True)]
    assert results[1]["tokens"] == CHAT.response("gh") and len(results[1]["log_probabilities"]) == 3
    flags = ("--temperature=60", "--max_new_tokens=12")
    shown = [talk("a\na\n", *flags, f"--seed={seed}")[0] for seed in (1, 1, 2)]
    assert shown[0] == shown[1] != shown[2] and len(set(shown[0].split("\n"))) > 1


def test_a_long_chat_forgets_and_skips_bad_lines(talker):
    """20 of the context's 40 tokens are for prompts."""
    typed = "h" * 14 + "\nhhh\naXb\n" + "h" * 21 + "\nhhhhf\nf\n"
    result = command("sample.py", "--chat=talker", "--temperature=0", "--device=cpu", "--json=True", input=typed)
    assert result.returncode == 0
    lines_out = answers(result.stdout)
    assert [(line["prompt"], line.get("text")) for line in lines_out] == [
        ("h" * 14, ""), ("hhh", ""), ("aXb", None), ("h" * 21, None), ("hhhhf", "gh"), ("f", "gh"),
    ]  # fmt: skip
    lines = result.stderr.splitlines()
    assert [line.get("error") for line in lines_out[2:4]] == lines[1:3]  # one output line per input line
    assert lines[0].startswith("sampling from") and len(lines) == 4
    assert "the character 'X' (U+0058) at position 1" in lines[1]
    assert lines[2] == "the 21 tokens of the last turn are more than the 20 that the context leaves"
    assert lines[3] == "dropped the oldest turns: the context is 40 tokens"  # reported once


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--chat=out/letters"], "doesn't know how turns are marked (chat.json): train it first with: python"),
        (["--chat=nowhere"], "there is no model directory nowhere"),
        (["--chat="], "--chat is empty"),
        (["talker", "--chat=talker"], "the model is named more than once, talker and talker"),
        (["--chat=talker", "--start=a"], "both start and chat say where prompts come from"),
        (["--chat=talker", "--prompts=a"], "both prompts and chat"),
        (["--chat=talker", "--interactive=True"], "both interactive and chat"),
        (["--chat=talker", "--num_samples=2"], "a chat has one answer to each turn"),
        (["--chat=talker", "--num_beams=2"], "leave num_samples and num_beams out"),
        (["--system=a"], "system is what a chat begins with: name the model by --chat"),
        (
            ["--chat=talker", f"--system={'a' * 20}"],
            "the system turn take 20 of the 20 tokens for a prompt",
        ),
        (["--chat=talker", "--system=X"], "the character 'X'"),
        (["--chat=talker", "--temperature=-1"], "temperature = -1"),
    ],
)
def test_mistakes_about_a_chat(talker, say, args, sentence):
    assert sentence in say(*args)


def test_plain_decoding_imports_no_slow_modules(letters):
    """Modules that take seconds to import are for compiled decoding only."""
    code = (
        "import atexit, runpy, sys\n"
        "slow = {'torch._dynamo', 'torch._inductor', 'transformers', 'datasets', 'wandb'}\n"
        "atexit.register(lambda: print('imported', sorted(slow & sys.modules.keys())))\n"
        "sys.argv = ['sample.py', '--temperature=0', '--max_new_tokens=5', '--start=ab', '--device=cpu']\n"
        f"runpy.run_path({str(ROOT / 'sample.py')!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "abcdefg\nimported []\n", (result.stdout, result.stderr)


# ---- auto


def test_automatic_precision_of_decoding(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert resolve_decoding_dtype("auto", cpu, 1000) == torch.float32
    assert resolve_decoding_dtype("auto", cpu, 10**9) == torch.bfloat16
    assert resolve_decoding_dtype("bfloat16", cpu, 1000) == torch.bfloat16
    assert resolve_decoding_dtype("float16", cpu, 10**9) == torch.float16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert resolve_decoding_dtype("auto", cpu, 10**9) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_decoding_dtype("auto", torch.device("cuda"), 1000) == torch.bfloat16


def test_automatic_compilation_of_decoding(monkeypatch):
    cpu, model = torch.device("cpu"), counting_model(9, 4)
    monkeypatch.setenv("CXX", "c++")
    assert resolve_decoding_compile("auto", cpu, model, 10**6)
    assert not resolve_decoding_compile("auto", cpu, model, 500)
    assert not resolve_decoding_compile("auto", torch.device("mps"), model, 10**6)
    assert resolve_decoding_compile(True, cpu, model, 1)
    assert not resolve_decoding_compile(False, cpu, model, 10**6)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not resolve_decoding_compile("auto", cpu, model, 10**6)
    for works in (True, False):  # whether Triton and the GPU support it
        monkeypatch.setattr(load_module, "resolve_compile", lambda setting, device, flops, works=works: (works, ""))
        assert resolve_decoding_compile("auto", torch.device("cuda"), model, 10**6) == works
