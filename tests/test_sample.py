"""sample.py as a user runs it, with a model whose continuations are known."""

import io
import json
import os
import shutil
import signal
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
from stub_models import counting_model
from warm import WarmPopen

LETTERS = "\nabcdefgh"


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
    assert "keeping the last 4 of the prompt's 11 tokens" in result.stderr and result.returncode == 0


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
        (["--temperature=-1"], "temperature = -1.0 must be at least 0"),
        (["--top_k=0"], "top_k = 0"),
        (["--top_p=1.5"], "top_p = 1.5"),
        (["--num_samples=0"], "num_samples = 0"),
        (["--max_new_tokens=-1"], "max_new_tokens = -1"),
        (["--stop="], "stop is an empty text"),
        (["--tempratur=1"], "did you mean --temperature"),
        (["out/letters", "--out_dir=x"], "named more than once"),
        (["--device=cuda"], "is not available here"),
        (["--min_p=0"], "min_p = 0.0 must be between 0 and 1, 0 excluded"),
        (["--min_p=1.5"], "min_p = 1.5"),
        (["--repetition_penalty=0"], "repetition_penalty = 0.0 must be between 0.01 and 100"),
        (["--repetition_penalty=-2"], "repetition_penalty = -2.0"),
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
        (["--num_beams=2", "--length_penalty=-1"], "length_penalty = -1.0"),
        (["--draft=nowhere"], "there is no model directory nowhere"),
        (["--draft=out/letters", "--draft_tokens=0"], "draft_tokens = 0"),
        (["--int8=True", "--compile=True", "--num_samples=2"], "int8 is for one row at a time"),
        (["--int8=True", "--compile=False"], "int8 is for one row at a time"),
    ],
)
def test_mistakes_are_one_sentence(letters, say, args, sentence):
    (letters.parents[2] / "empty.txt").touch()
    assert sentence in say(*args)


def test_no_run_and_no_tokenizer(letters, say, tmp_path):
    (letters / "tokenizer.json").unlink()
    assert "has no tokenizer, so it can't read text" in say()
    (letters.parent / "last").unlink()
    assert "train one first" in say()


# ---- several prompts, and JSON


def answers(text):
    return [json.loads(line) for line in text.splitlines()]


def test_json_tells_tokens_with_their_log_probabilities_and_times(letters, say):
    flags = ("--json=True", "--start=ab", "--temperature=30", "--top_k=5", "--max_new_tokens=30")
    told = answers(say(*flags, "--num_samples=3"))
    assert len({one["text"] for one in told}) == 3
    tokenizer = CharTokenizer(LETTERS)
    model = load_model(letters)[0].eval()
    for one in told:
        assert one.keys() == {
            "prompt", "text", "tokens", "log_probabilities", "ended", "first_token_seconds", "seconds",
            "tokens_per_second",
        }  # fmt: skip
        assert one["prompt"] == "ab" and tokenizer.decode(one["tokens"]) == one["text"] and not one["ended"]
        text = tokenizer.encode("ab") + one["tokens"]
        with torch.no_grad():  # this model looks at the last token alone
            logs = model(torch.tensor(text)[:, None])[:, 0].log_softmax(-1)
        expected = [logs[i, text[i + 1]].item() for i in range(1, len(text) - 1)]
        assert one["log_probabilities"] == pytest.approx(expected, abs=1e-4)
        assert 0 < one["first_token_seconds"] < one["seconds"]
        assert one["tokens_per_second"] == pytest.approx(30 / one["seconds"])
    assert answers(say(*flags, "--num_samples=1"))[0]["text"] == told[0]["text"]


def test_json_of_a_text_that_ends(letters, say):
    (one,) = answers(say("--json=True", "--temperature=0", "--stop=de", "--start=a"))
    assert (one["text"], one["ended"], one["tokens"]) == ("bc", True, CharTokenizer(LETTERS).encode("bcde"))
    (one,) = answers(say("--json=True", "--max_new_tokens=0", "--start=a"))
    assert one["tokens"] == one["log_probabilities"] == [] and one["seconds"] is None


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_has_a_prompt_a_line_and_a_blank_one_begins_by_itself(letters, say, tmp_path, end):
    lines = ["ab", "", "fgh", "a" * 9]
    for last in ("", end):
        (tmp_path / "prompts.txt").write_bytes((end.join(lines) + last).encode())
        told = answers(say("--prompts=prompts.txt", "--json=True", *GREEDY))
        assert [one["prompt"] for one in told] == lines
        assert [one["text"] for one in told] == ["cdefg", "abcde", "\nabcd", "bcdef"]
    text = say("--prompts=prompts.txt", "--num_samples=2", "--batch_size=3", *GREEDY)
    parts = text.removesuffix("\n").split("\n" + "-" * 15 + "\n")
    assert parts == [part for part in ("abcdefg", "abcde", "fgh\nabcd", "a" * 9 + "bcdef") for _ in range(2)]


def test_a_prompt_of_a_file_that_cant_be_written_is_refused(letters, say, tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\naXb\n")
    assert "the prompt 'aXb': the character 'X' (U+0058) at position 1" in say("--prompts=prompts.txt", *GREEDY)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_the_batch_size_changes_nothing(letters, say, tmp_path, batch_size):
    (tmp_path / "prompts.txt").write_text("a\nbcd\n\n")
    flags = ("--prompts=prompts.txt", "--num_samples=3", "--temperature=30", "--stop=a", "--max_new_tokens=25")
    texts = say(*flags, "--seed=3")
    assert say(*flags, "--seed=3", f"--batch_size={batch_size}") == texts != say(*flags, "--seed=4")


# ---- other ways to go on


def test_beams(letters, say):
    assert say("--num_beams=3", "--max_new_tokens=5", "--start=ab") == "abcdefg\n"
    told = answers(say("--num_beams=3", "--num_samples=3", "--max_new_tokens=4", "--start=ab", "--json=True"))
    sums = [sum(one["log_probabilities"]) for one in told]
    assert told[0]["text"] == "cdef" and sums == sorted(sums, reverse=True) and len({one["text"] for one in told}) == 3
    assert all(CharTokenizer(LETTERS).decode(one["tokens"]) == one["text"] for one in told)
    assert all(0 < one["first_token_seconds"] <= one["seconds"] for one in told)
    assert "leave stop or num_beams out" in say("--num_beams=2", "--stop=e")


def test_beams_end_with_the_token_between_documents(tmp_path, monkeypatch, say):
    monkeypatch.chdir(tmp_path)
    tokenizer = BPETokenizer.train([], 257)
    model = counting_model(257, 8)
    with torch.no_grad():  # after "b" comes the end
        model.head.weight[tokenizer.end_of_text] = 60 * torch.eye(257)[tokenizer.encode("b")[0]]
    save_model(model, tokenizer, tmp_path / "bytes")
    for flags in (("--num_beams=2",), ("--temperature=0",), ("--temperature=0", "--draft=bytes")):
        (one,) = answers(say("bytes", "--start=`", "--json=True", "--max_new_tokens=9", *flags))
        assert one["text"] == "ab" and one["ended"] and one["tokens"][-1] == tokenizer.end_of_text
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
    flags = ("--temperature=30", "--num_samples=3", "--json=True", "--draft=out/letters", "--max_new_tokens=40")
    told = answers(say(*flags))
    assert len({one["text"] for one in told}) == 3 and say(*flags, "--seed=7") != say(*flags)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
@pytest.mark.slow
def test_compiled_and_8_bit_decoding(letters, say, tmp_path):
    assert say(*GREEDY, "--start=ab", "--compile=True") == "abcdefg\n"
    assert say(*GREEDY, "--start=ab", "--compile=True", "--int8=True") == "abcdefg\n"
    assert say(*GREEDY, "--start=ab", "--compile=True", "--num_samples=2") == f"abcdefg\n{'-' * 15}\nabcdefg\n"


# ---- as it is made, and asked for

SAMPLE = [sys.executable, str(ROOT / "sample.py"), "--device=cpu", "--compile=False", "--temperature=0"]


def read_until(descriptor, wanted, seconds=60):
    """What comes, up to and with the bytes `wanted`."""
    seen, last = b"", time.monotonic() + seconds
    os.set_blocking(descriptor, False)
    while wanted not in seen:
        assert time.monotonic() < last, seen
        try:
            seen += os.read(descriptor, 1 << 16)
        except BlockingIOError:
            time.sleep(0.01)
    return seen


def test_text_appears_as_it_is_made(letters):
    process = WarmPopen([*SAMPLE, "--start=ab", "--max_new_tokens=1000000"], stdout=subprocess.PIPE)
    try:
        seen = read_until(process.stdout.fileno(), b"abcdefgh\nabc")
        assert process.poll() is None and len(seen) < 4_000  # less than a buffer holds
        read_until(process.stdout.fileno(), b"abcdefgh\nabc")
    finally:
        process.kill()
        process.communicate()


def test_prompts_from_a_pipe(letters):
    typed = "ab\n\naXb\ncd\nfgh"
    result = command("sample.py", *GREEDY, "--interactive=True", "--device=cpu", input=typed)
    assert result.returncode == 0 and result.stdout == "abcdefg\nabcde\ncdefgh\n\nfgh\nabcd\n"
    assert "the prompt 'aXb': the character 'X' (U+0058) at position 1" in result.stderr
    assert result.stderr.count("\n") == 2 and "> " not in result.stdout  # the other line names the model


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("way", ["--interactive=True", "--chat=talker"])
def test_ctrl_c_ends_a_continuation_and_ctrl_d_the_program(talker, way):
    import pty

    model = counting_model(len(LETTERS) + 1, 40)
    with torch.no_grad():  # after the last letter comes the first, and no end
        model.head.weight[[0, -1]] = model.head.weight[[-1, 0]]
    save_model(model, CharTokenizer(LETTERS), talker)

    ours, theirs = pty.openpty()

    def before():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        os.login_tty(theirs)

    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([*SAMPLE, way, "--max_new_tokens=1000000"], preexec_fn=before, env=buffered)
    os.close(theirs)
    try:
        read_until(ours, b"> ")
        for prompt in (b"ab", b"f"):
            os.write(ours, prompt + b"\n")
            read_until(ours, b"defgh\r\nabcdefgh\r\nabc")
            os.write(ours, b"\x03")
            assert b"Traceback" not in read_until(ours, b"> ")
            assert process.poll() is None
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


# ---- a conversation

CHAT = ChatFormat(Template(*["{content}"] * 2, "{content}<|end|>"), CharTokenizer(LETTERS), {"<|end|>": len(LETTERS)})


@pytest.fixture
def talker(letters, tmp_path):
    """A model directory, talker, that answers with the rest of the alphabet: "gh" to "f"."""
    save_model(counting_model(len(LETTERS) + 1, 40), CharTokenizer(LETTERS), tmp_path / "talker")
    CHAT.save(tmp_path / "talker")
    return tmp_path / "talker"


@pytest.fixture
def talk(talker, say, monkeypatch):
    """Type lines and the end of input: what was printed, and what the model was asked to continue each time."""
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


def test_a_chat_goes_on_from_what_was_said(talk):
    shown, read = talk("f\nae\nh\n\nbg")
    assert shown == "gh\nfgh\n\n\nabcdefgh\nh\n"  # an empty question follows the end of an answer, the last token
    said = ["f", "gh", "ae", "fgh", "h", "", ""]
    assert read[:4] == [CHAT.prompt(exchange(*said[:n])) for n in (1, 3, 5, 7)] and len(read) == 5
    shown, read = talk("f\nae", "--system=abc")
    assert shown == "gh\nfgh\n" and read[1] == CHAT.prompt([Turn("system", "abc"), *exchange("f", "gh", "ae")])


def test_an_answer_ends_with_its_token_the_stop_text_or_max_new_tokens(talk):
    assert talk("a\n")[0] == "bcdefgh\n"
    shown, read = talk("a\nb\n", "--max_new_tokens=3")
    assert shown == "bcd\ncde\n" and read[1] == CHAT.prompt(exchange("a", "bcd", "b"))
    shown, read = talk("a\nb\n", "--stop=fg")
    assert shown == "bcde\ncde\n" and read[1] == CHAT.prompt(exchange("a", "bcde", "b"))
    assert talk("a\nb\n", "--draft=talker")[0] == "bcdefgh\ncdefgh\n"


def test_a_chat_as_json_and_by_chance(talk):
    told = answers(talk("a\nf\n", "--json=True", "--max_new_tokens=3")[0])
    assert [(one["prompt"], one["text"], one["ended"]) for one in told] == [("a", "bcd", False), ("f", "gh", True)]
    assert told[1]["tokens"] == CHAT.response("gh") and len(told[1]["log_probabilities"]) == 3
    flags = ("--temperature=60", "--max_new_tokens=12")
    shown = [talk("a\na\n", *flags, f"--seed={seed}")[0] for seed in (1, 1, 2)]
    assert shown[0] == shown[1] != shown[2] and len(set(shown[0].split("\n"))) > 1


def test_a_long_chat_forgets_and_a_line_that_cant_be_read_is_passed_over(talker):
    """Of a context of 40 tokens, prompts have 20."""
    typed = "h" * 14 + "\nhhh\naXb\n" + "h" * 21 + "\nhhhhf\nf\n"
    result = command("sample.py", "--chat=talker", "--temperature=0", "--device=cpu", "--json=True", input=typed)
    assert result.returncode == 0
    given = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["prompt"], one.get("text")) for one in given] == [
        ("h" * 14, ""), ("hhh", ""), ("aXb", None), ("h" * 21, None), ("hhhhf", "gh"), ("f", "gh"),
    ]  # fmt: skip
    assert [one.get("error") for one in given[2:4]] == result.stderr.splitlines()[1:3]  # a line out for every line in
    lines = result.stderr.splitlines()
    assert lines[0].startswith("sampling from") and len(lines) == 4
    assert "the character 'X' (U+0058) at position 1" in lines[1]
    assert lines[2] == "the 21 tokens of the last turn are more than the 20 that the context leaves"
    assert lines[3] == "dropped the oldest turns: the context is 40 tokens"  # said once


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--chat=out/letters"], "has no chat.json: train it on conversations first, by stages/sft.py"),
        (["--chat=nowhere"], "there is no model directory nowhere"),
        (["--chat="], "chat is an empty name"),
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
        (["--chat=talker", "--temperature=-1"], "temperature = -1.0"),
    ],
)
def test_mistakes_about_a_chat(talker, say, args, sentence):
    assert sentence in say(*args)


def test_the_first_character_does_not_wait_for_a_compiler(letters):
    """What takes torch seconds to import is for compiled decoding only."""
    code = (
        "import atexit, runpy, sys\n"
        "slow = {'torch._dynamo', 'torch._inductor', 'transformers', 'datasets', 'wandb'}\n"
        "atexit.register(lambda: print('imported', sorted(slow & sys.modules.keys())))\n"
        "sys.argv = ['sample.py', '--temperature=0', '--max_new_tokens=5', '--start=ab', '--device=cpu']\n"
        f"runpy.run_path({str(ROOT / 'sample.py')!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "abcdefg\nimported []\n", (result.stdout, result.stderr)


# ---- what auto means


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
    for works in (True, False):  # as Triton and the GPU allow
        monkeypatch.setattr(load_module, "resolve_compile", lambda setting, device, flops, works=works: (works, ""))
        assert resolve_decoding_compile("auto", torch.device("cuda"), model, 10**6) == works
