"""Errors of reading name their cause: a file is missing, unreadable, too large or damaged, and each is said as such."""

import ast
import json
import os
from pathlib import Path
from typing import Literal

import pytest
import torch

import train
from gpt_arc.chat.format import TEMPLATES, ChatFormat, load_chat_model, load_text_with_chat, load_with_chat
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer
from gpt_arc.decoding.settings import SampleConfig
from gpt_arc.errors import UserError
from gpt_arc.evaluation.tasks import load_task
from gpt_arc.manifest import RecordedFile
from gpt_arc.reading import read_bytes, read_json, read_toml, reading
from gpt_arc.settings import build
from gpt_arc.training.checkpoints import recorded
from gpt_arc.training.config import Config
from gpt_arc.training.log import MetricsLog, read_metrics
from gpt_arc.training.runs import read_record, write_record
from gpt_arc.training.stage_options import SFTOptions
from gpt_arc.training.stage_record import record_options, recorded_options
from gpt_arc.weights.directory import load_model, save_model
from helpers import ROOT, TEXT, TINY_FLAGS
from model import GPT, GPTConfig
from sample import Sampler


class PanicException(BaseException):
    """As pyo3 raises it for a panic in Rust."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError(2, "No such file or directory", "a"), "^a is missing$"),
        (PermissionError(13, "Permission denied", "a"), "^a can't be read: permission denied$"),
        (OSError(5, "Input/output error"), "^a can't be read: input/output error$"),
        (OSError("odd"), "^a can't be read: odd$"),
        (MemoryError(), "^a can't be read: out of memory$"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "^a can't be read: out of memory$"),
        (
            RuntimeError("PytorchStreamReader failed\nException raised from ..."),
            "^a is damaged: PytorchStream",
        ),
        (RecursionError("maximum recursion depth exceeded"), "^a is damaged: it is nested too deeply$"),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid"), "^a is damaged: byte 1 is not UTF-8$"),
        (KeyError("model_type"), "^a is damaged: it lacks 'model_type'$"),
        (PanicException("Error while\nmatching"), "^a is damaged: Error while$"),
        (ValueError(), "^a is damaged: ValueError$"),
    ],
)
def test_an_error_is_a_sentence_by_its_cause(error, sentence):
    with pytest.raises(UserError, match=sentence), reading("a"):
        raise error


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_of_the_file_passes(stop):
    with pytest.raises(stop), reading("a"):
        raise stop


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="a has more than 4 bytes"):
        read_bytes(tmp_path / "a", 4)
    with pytest.raises(UserError, match="is not a plain file"):
        read_bytes("/dev/zero")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[" * 100_000, "it is not JSON: recursion limit exceeded"),
        (b'{"a": {"b": Infinity}}', "a.b = Infinity must be a finite number"),
        (b'{"a": {"b": "1"}}', 'a.b = "1" must be a number'),
        (b'{"a": "\xff"}', "it is not JSON: invalid unicode"),
        (b'{"a": {"b": ' + b"9" * 9999 + b"}}", "it is not JSON: number out of range"),
    ],
)
def test_json_is_checked_against_a_schema(tmp_path, content, sentence):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a.json is damaged: ") as refusal:
        read_json(tmp_path / "a.json", dict[str, dict[str, float]])
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        (str, "3", "a text"),
        (int, "1.5", "a whole number"),
        (float, "true", "a number"),
        (bool, "1", "true or false"),
        (list[int], "{}", "a list"),
        (tuple[int, ...], "3", "a list"),
        (dict[str, int], "[]", "a table"),
        (RecordedFile, "[]", "a table"),
        (Literal[1], "2", "1"),
    ],
)
def test_a_value_of_another_type_is_refused_in_plain_words(tmp_path, schema, value, expected):
    path = tmp_path / "a.json"
    path.write_text(f'{{"a": {value}}}')
    with pytest.raises(UserError) as refusal:
        read_json(path, dict[str, schema])
    assert str(refusal.value) == f"{path} is damaged: a = {value} must be {expected}"
    path.write_text(value)
    with pytest.raises(UserError) as refusal:
        read_json(path, schema)
    assert str(refusal.value) == f"{path} is damaged: it must be {expected}"


@pytest.mark.parametrize("content", [b"a = " + b"[" * 100_000, b"a = '\xff'", b"a = 1 1", b"a = " + b"{b=" * 9999])
def test_toml_of_any_content_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "a.toml").write_bytes(content)
    for read in (read_toml, lambda path: load_task(str(path))):
        with pytest.raises(UserError, match="a.toml is not valid TOML: ") as refusal:
            read(tmp_path / "a.toml")
        assert "\n" not in str(refusal.value)


def test_a_damaged_line_of_the_log_does_not_block_resuming(workplace, stage_runner):
    stage_runner(train, "sums.toml", *TINY_FLAGS, "--out_dir=run")
    path = Path("run/metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    odd = [b'{"step": 3, \xff}\n', b"[" * 100_000 + b"\n", b'{"step": "3"}\n', b'{"step": true}\n', b"7\n", b"9" * 5000]
    path.write_bytes(b"".join(lines[:2] + odd + [b"\n"] + lines[2:]))
    assert "finished step 9" in stage_runner(train, "--resume=run", "--max_iters=9")
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 10))


def test_values_of_the_log_that_are_no_numbers_are_left_out(tmp_path):
    odd = '{"step": 1, "val_loss": "x", "seconds": [1], "train_loss": 1e400, "tokens": 1%s, "mfu": null}' % ("0" * 400)
    (tmp_path / "metrics.jsonl").write_text(odd + '\n{"step": 2, "val_loss": 1.5}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "val_loss": 1.5}]


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": 1}', b'["../step-00000001", 7]', b"\xff", None])
def test_a_damaged_list_of_checkpoints_deletes_none(tmp_path, content):
    (tmp_path / "step-00000001").mkdir()
    if content is None:
        os.mkfifo(tmp_path / "checkpoints.json")  # which nobody writes to
    else:
        (tmp_path / "checkpoints.json").write_bytes(content)
    assert recorded(tmp_path) == []


def test_a_pipe_in_place_of_a_file_of_a_run_does_not_hang(tmp_path):
    log = MetricsLog(tmp_path, 0)
    os.mkfifo(tmp_path / "samples.txt")
    log.write_sample(1, "a text")


@pytest.mark.parametrize("count", [b"Infinity", b"1e999", b'"9"', b"-1", b"[]"])
def test_a_count_that_is_none_is_refused_by_name(workplace, count):
    meta = Path("data/sums/meta.json")
    (meta.parent / "manifest.json").unlink(missing_ok=True)
    meta.write_bytes(b'{"tokens": {"train": %s}}' % count)
    with pytest.raises(UserError, match=r"meta.json is damaged: tokens.train = "):
        open_corpus([Source("sums", 1.0)])


def test_a_pattern_that_backtracks_without_end_is_a_sentence(tmp_path):
    """Oniguruma gives up after so many steps, and the library panics."""
    table = json.loads(BPETokenizer.train([TEXT], 270).files()["tokenizer.json"])
    table["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="the tokenizer can't encode 'aaaa"):
        tokenizer.encode("a" * 30 + "b")


@pytest.mark.parametrize(
    "load",
    [
        load_chat_model,
        load_with_chat,
        load_text_with_chat,
        lambda path: Sampler(SampleConfig(chat=str(path), device="cpu"), 1),
    ],
)
def test_a_mark_beyond_the_model_is_refused(tmp_path, load):
    letters = CharTokenizer("abcdefgh")
    save_model(GPT(GPTConfig(8, 11, 1, 1, 8)), letters, tmp_path)
    ChatFormat.new(TEMPLATES["markers"], letters, 8).save(tmp_path)
    with pytest.raises(UserError, match=r"chat.json has a token of the id 11, and the model 11 rows"):
        load(tmp_path)


def test_memory_that_runs_out_is_not_called_damage(tmp_path, monkeypatch):
    save_model(GPT(GPTConfig(8, 8, 1, 1, 8)), None, tmp_path)

    def to(self, *args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(UserError, match="model.safetensors can't be read: out of memory"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 2**40}, r"run.json: batch_size = \d+ must be between 1 and 2147483647"),
        ({"batch_size": 2**20}, r"batch_size x block_size = 1073741824 is more than 16777216: lower batch_size"),
        ({"gradient_accumulation_steps": 2**24}, "batch_size x gradient_accumulation_steps = .* is more than 1048576"),
        ({"n_layer": 10**9}, "n_layer = 1000000000 must be between 1 and 1024"),
        ({"threads": 10**6}, "threads = 1000000 must be .*between 1 and 4096"),
        ({"out_dir": "elsewhere"}, "run.json is damaged: out_dir is never recorded"),
        ({"overwrite": True}, "run.json is damaged: overwrite is never recorded"),
    ],
)
def test_a_record_of_a_run_is_bounded(tmp_path, changes, sentence):
    write_record(tmp_path, Config(), "tiny", changes)
    with pytest.raises(UserError, match=sentence):
        build(Config, read_record(tmp_path)[1])


@pytest.mark.parametrize("changes", [{"batch_size": 2**40}, {"batch_size": 2**21}, {"epochs": 2**40}])
def test_a_record_of_a_stage_is_bounded(tmp_path, changes):
    record_options(tmp_path, "sft", SFTOptions(model="base"))
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"options": record["options"] | changes}))
    with pytest.raises(UserError, match=f"run.json: .*{next(iter(changes))}.* (must be between|is more than)"):
        recorded_options(tmp_path, SFTOptions, "sft")


IMPORTS_BY_NAME = {
    "gpt_arc/alignment/rewards.py",
    "gpt_arc/extras.py",
    "tools/bench.py",
}  # a flag, or names in the code


PLAIN_PICKLES = {"gpt_arc/weights/nanogpt.py"}  # its Unpickler refuses every name: tests/tools/test_from_nanogpt.py


def test_nothing_that_is_read_is_executed():
    sources = [
        *ROOT.glob("*.py"),
        *(path for name in ("gpt_arc", "stages", "tools") for path in (ROOT / name).rglob("*.py")),
    ]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
            assert not names & {"dill", "cloudpickle", "joblib", "marshal"}, path
            assert "pickle" not in names or str(path.relative_to(ROOT)) in PLAIN_PICKLES, path
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert not {"trust_remote_code", "allow_pickle"} & keywords.keys(), path
            assert called not in ("eval", "exec"), path
            assert called != "torch.load" or keywords.get("weights_only") == "True", path
            if called == "importlib.import_module":
                assert str(path.relative_to(ROOT)) in IMPORTS_BY_NAME, path
