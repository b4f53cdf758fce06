"""What train.py and all stages have in common: metrics.jsonl, trackers of metrics, the commands to type next."""

import json
import random
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from gpt_arc.data.documents import merge_inputs
from gpt_arc.data.tokenizer import BPETokenizer
from gpt_arc.decoding.settings import SampleConfig
from gpt_arc.errors import entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.settings import settings_in
from gpt_arc.training.command_line import read_command_line, read_options
from gpt_arc.training.log import METRICS, MetricsLog, movement, read_metrics, start_tracker
from gpt_arc.training.schedule import HIGHEST
from gpt_arc.training.stage_options import (
    DPOOptions,
    EncoderOptions,
    FinetuneOptions,
    PPOOptions,
    RewardOptions,
    SFTOptions,
)
from helpers import ROOT, TINY_FLAGS, interrupt_at, randomised, write, write_dataset
from model import GPT
from policy_tree import save_chat_model
from prepare import decontaminate, text, tokenizer
from ranked_texts import CHAT, LETTERS, rankings, tiny_config
from stages import dpo, finetune, ppo, pretrain_encoder, reward, sft
from stages import eval as evaluation

OPTIONS = {
    **{dpo: DPOOptions, finetune: FinetuneOptions, ppo: PPOOptions, pretrain_encoder: EncoderOptions},
    **{reward: RewardOptions, sft: SFTOptions},
}

QUICK = ("--device=cpu", "--dtype=float32", "--learning_rate=1e-3", "--batch_size=4", "--out_dir=run")
TRAINING = (train, "letters.toml", *TINY_FLAGS, "--out_dir=run")
PAIRS = (*TRAINING, "--dataset=documents", "--attention=bidirectional", "--token_types=2", "--next_sentence=True")
STAGES = {
    "sft": (sft, "base", "--train=chats.jsonl", "--epochs=2", "--val_fraction=0.2", *QUICK),
    "reward": (
        *(reward, "base", "--train=rankings.jsonl", "--gradient_accumulation_steps=1", "--val_fraction=0.2", *QUICK),
        "--epochs=2",
    ),
    "dpo": (dpo, "base", "--train=rankings.jsonl", "--gradient_accumulation_steps=1", "--val_fraction=0.2", *QUICK),
    "ppo": (
        *(ppo, "base", "--prompts=chats.jsonl", "--reward=rules_of_all:letters", "--monitor=rules_of_all:letters"),
        *("--episodes=16", "--gradient_accumulation_steps=1", "--minibatches=2", "--max_new_tokens=4", *QUICK),
        *("--pretraining_dataset=letters", "--pretraining_batch_size=2"),
    ),
    "pretrain_encoder": (
        *(pretrain_encoder, "--image_encoder=encoder.toml", "--train=images.jsonl", "--epochs=2"),
        *("--val_fraction=0.25", *QUICK),
    ),
    "finetune": (finetune, "base", "--train=labels.csv", "--epochs=2", "--val_fraction=0.25", *QUICK),
}
NUMBERS = (finetune, "base", "--train=numbers.csv", "--numbers", "--epochs=2", "--val_fraction=0.25", *QUICK)


def test_help_and_documents_state_the_published_learning_rates():
    table = (ROOT / "docs/results/learning_rates.md").read_text()
    lines = re.findall(r"^\| `(\w+)\.py` \| (\S+) \| ([\d.]+)([MB])", table, re.MULTILINE)
    rows = {script: figures for script, *figures in lines}
    for module, options in OPTIONS.items():
        shown = settings_in(options)["learning_rate"].help
        figures = re.search(r"None: .* (\S+) for ([\d.]+)([MB]) parameters without", shown).groups()
        rate, size, unit = rows.pop(Path(module.__file__).stem)
        assert [*figures] == [rate, size, unit] and f"sqrt({size}{unit} / parameters), up to {HIGHEST}." in shown
        assert options.PUBLISHED == (float(rate), float(size) * {"M": 1e6, "B": 1e9}[unit])
    assert not rows


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    save_chat_model(randomised(GPT(tiny_config(n_layer=1))), CHAT, "base")
    tokens = np.array(LETTERS.encode("abcdefgh" * 40))
    write_dataset(Path("data/letters"), LETTERS, {"train": tokens, "val": tokens[:64]})
    pieces = BPETokenizer({bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256})
    tokens = np.array((*pieces.encode("abcdefgh" * 4), 256) * 20)
    write_dataset(Path("data/documents"), pieces, {"train": tokens, "val": tokens})
    Path("letters.toml").write_text('[data]\ndataset = "letters"\n')
    write("chats.jsonl", [{"prompt": text, "response": text[::-1]} for text in ("ab", "cde", "fgh", "bcdea", "a")] * 3)
    write("rankings.jsonl", rankings(12))
    texts = ("ab", "ba", "abc", "bcd") * 4
    Path("labels.csv").write_text("text,label\n" + "".join(f"{text},{text[0]}\n" for text in texts))
    Path("numbers.csv").write_text("text,label\n" + "".join(f"{text},{len(text)}\n" for text in texts))
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 4), colour).save(f"{colour}.png")
    write("images.jsonl", [{"image": f"{colour}.png", "label": colour} for colour in ("red", "blue")] * 8)
    Path("encoder.toml").write_text("image_size = 4\npatch_size = 2\nn_layer = 1\nn_head = 2\nn_embd = 8\n")
    Path("rules_of_all.py").write_text("def letters(rows, responses): return [text.count('b') for text in responses]\n")
    yield tmp_path
    sys.modules.pop("rules_of_all", None)


def documented():
    """The keys of each script's metrics.jsonl, by the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("**metrics.jsonl**") : text.index("**report.json**")]
    rows = re.findall(r"^\| (\w+)[^|]*\| (.*) \|$", table, re.MULTILINE)
    return {script: set(re.findall(r"`(\w+)`", keys)) for script, keys in rows}


def test_every_key_is_documented_and_explained():
    assert set().union(*documented().values()) | {"step", "seconds", "skipped"} == METRICS.keys()


@pytest.mark.parametrize("script", ["train", *STAGES])
def test_a_run_writes_the_documented_keys(script, workplace, stage_runner):
    runs = {"train": [TRAINING, PAIRS], "finetune": [STAGES["finetune"], NUMBERS]}.get(script) or [STAGES[script]]
    keys = set()
    for number, (module, *flags) in enumerate(runs):
        output = stage_runner(module, *flags, f"--out_dir={number}")
        assert isinstance(output, str), output.message
        lines = read_metrics(Path(f"{number}/metrics.jsonl"))
        keys |= set().union(*lines)
        for name in ("step", "seconds", "tokens", "epoch", "episodes"):
            values = [line[name] for line in lines if name in line]
            assert values == sorted(values), name
    optional = {"mfu"}  # the peak rate of a CPU may be unknown
    assert keys | optional == documented()[script] | {"step", "seconds"} | optional


def test_older_files_are_read_by_the_present_names(tmp_path):
    write(tmp_path / "metrics.jsonl", [
        {"step": 1, "loss": 2.0, "tokens": 5},
        {"step": 2, "loss": 1.0, "tokens": 7, "val_loss": 3.0},
        {"step": 3, "task_loss": 0.5},
        {"step": 4, "rollout_seconds": 1.0, "seconds": 2.0},
        {"step": 5, "train_loss": 0.5, "tokens": 9, "seconds": 4.0},
        {"step": 6, "loss": "damaged", "tokens": "damaged"},
    ])  # fmt: skip
    lines = [
        {"step": 1, "train_loss": 2.0, "tokens": 5},
        {"step": 2, "train_loss": 1.0, "tokens": 12, "val_loss": 3.0},
        {"step": 3, "train_loss": 0.5},
        {"step": 4, "rollout_seconds": 1.0, "iteration_seconds": 2.0},
        {"step": 5, "train_loss": 0.5, "tokens": 9, "seconds": 4.0},
        {"step": 6},
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
    MetricsLog(tmp_path, 4).close()  # a resumed run goes on with the present names
    assert list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())) == lines[:4]


# ---- Weights & Biases


class StubWandb:
    """Weights & Biases without a network: its runs, by id, with the lines that they were given."""

    def __init__(self):
        self.runs, self.calls, self.finished = {}, [], 0
        self.init_error = self.log_error = None

    def init(self, *, id, dir, **settings):
        (Path(dir) / "wandb" / "run").mkdir(parents=True, exist_ok=True)
        self.calls.append({"id": id, **settings})
        if self.init_error:
            raise self.init_error
        self.id = id or f"id{len(self.runs)}"
        self.runs.setdefault(self.id, [])
        return self

    def log(self, line, step):
        if self.log_error:
            raise self.log_error
        assert line["step"] == step
        self.runs[self.id].append(line)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    stub = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


ALL = {"train": TRAINING} | STAGES
CONFIRM = {"ppo": ["--reward=rules_of_all:letters", "--monitor=rules_of_all:letters"]}


@pytest.mark.parametrize("script", ALL)
def test_a_resumed_run_continues_its_run_of_weights_and_biases(script, workplace, stage_runner, wandb, monkeypatch):
    module, *flags = ALL[script]
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        stopped = stage_runner(module, *flags, "--wandb_log", "--wandb_project=letters", "--wandb_run_name=first")
    assert stopped.code == 130 and wandb.finished == 1
    (call,) = wandb.calls
    assert (call["id"], call["project"], call["name"]) == (None, "letters", "first")
    assert call["config"]["learning_rate"] in (1e-3, 1e-2)
    before = len(wandb.runs["id0"])
    resumed = stage_runner(module, "--resume=run", *CONFIRM.get(script, []))
    assert isinstance(resumed, str), resumed.message
    assert wandb.calls[1]["id"] == "id0" and wandb.calls[1]["resume"] == "allow" and list(wandb.runs) == ["id0"]
    assert wandb.runs["id0"] == read_metrics(Path("run/metrics.jsonl")) and 0 < before < len(wandb.runs["id0"])
    assert wandb.finished == 2


@pytest.mark.parametrize("script", ["train", "sft", "finetune"])
def test_weights_and_biases_that_cannot_start_is_refused_with_what_to_do(
    script, workplace, stage_runner, wandb, monkeypatch
):
    module, *flags = ALL[script]
    wandb.init_error = RuntimeError("api_key not configured (no-tty).\nmore")
    refused = stage_runner(module, *flags, "--wandb_log")
    assert refused.code == 2 and refused.message.count("\n") == 1
    for words in ("(api_key not configured (no-tty).)", "--wandb_log=False", "WANDB_MODE=offline"):
        assert words in refused.message
    assert {path.name for path in Path("run").glob("*")} <= {".lock"}  # which goes with the process

    wandb.init_error = None
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        stage_runner(module, *flags, "--wandb_log")
    wandb.init_error = OSError("run id0 was deleted")
    refused = stage_runner(module, "--resume=run")
    assert refused.code == 2 and "(run id0 was deleted)" in refused.message
    wandb.init_error = None  # its traceback holds the lock of the refused run
    calls = len(wandb.calls)
    assert isinstance(stage_runner(module, "--resume=run", "--wandb_log=False"), str)
    assert len(wandb.calls) == calls


def test_weights_and_biases_that_fails_later_does_not_end_the_run(workplace, stage_runner, wandb):
    wandb.log_error = OSError("no network")
    module, *flags = STAGES["sft"]
    output = stage_runner(module, *flags, "--wandb_log")
    assert output.count("Weights & Biases: no network; the run goes on without it") == 1


# ---- TensorBoard and Trackio


@pytest.mark.parametrize("script", ["train", "sft", "finetune"])
def test_tensorboard_s_own_reader_finds_the_metrics_of_a_resumed_run(script, workplace, stage_runner, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module, *flags = ALL[script]
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        assert stage_runner(module, *flags, "--logger=tensorboard").code == 130
    resumed = stage_runner(module, "--resume=run")
    assert isinstance(resumed, str), resumed.message
    events = EventAccumulator("run/tensorboard").Reload()
    lines = read_metrics(Path("run/metrics.jsonl"))
    for name in events.Tags()["scalars"]:
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(line["step"], pytest.approx(line[name])) for line in lines if name in line], name
    assert set(events.Tags()["scalars"]) == {name for line in lines for name in line}
    (config, *_) = events.Tensors("config/text_summary")
    assert b'"learning_rate": 0.0' in config.tensor_proto.string_val[0]


def test_tensorboard_forgets_what_a_killed_run_logged_after_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = SimpleNamespace(logger="tensorboard", wandb_log=False, wandb_project="", wandb_run_name=None)
    for first, last, factor in ((0, 6, 1), (4, 8, 10)):
        log = MetricsLog(tmp_path, first, start_tracker(tmp_path, first, settings, {}))
        for step in range(first + 1, last + 1):
            log.write({"step": step, "train_loss": float(factor * step)})
        log.write_sample(last, "a text")
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert values == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60), (7, 70), (8, 80)]
    assert b"a text" in events.Tensors("sample/text_summary")[-1].tensor_proto.string_val[0]


class StubTrackio:
    """Trackio without a dashboard: its runs by name."""

    def __init__(self):
        self.runs, self.finished = {}, 0

    def init(self, project, *, name, config, resume, embed):
        assert (project, resume, embed) == ("letters", "allow", False) and config["learning_rate"] in (1e-3, 1e-2)
        self.lines = self.runs.setdefault(name, [])
        return self

    def log(self, line, step):
        self.lines.append({"step": step, **line})

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("script", ["train", "sft"])
def test_a_resumed_run_continues_its_run_of_trackio(script, workplace, stage_runner, monkeypatch):
    trackio = StubTrackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    module, *flags = ALL[script]
    flags += ["--logger=trackio", "--wandb_project=letters"]
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        stage_runner(module, *flags)
    assert isinstance(stage_runner(module, "--resume=run"), str)
    assert isinstance(stage_runner(module, *flags, "--overwrite=True"), str)  # another run in the same folder
    first, second = trackio.runs.items()
    assert first[0].startswith("run-") and second[0].startswith("run-") and first[0] != second[0]
    assert second[1] == read_metrics(Path("run/metrics.jsonl")) and len(first[1]) == len(second[1])
    assert trackio.finished == 3


def test_two_trackers_and_a_missing_one_are_refused(workplace, stage_runner, monkeypatch):
    module, *flags = ALL["train"]
    refused = stage_runner(module, *flags, "--logger=tensorboard", "--wandb_log")
    assert refused.code == 2 and "wandb_log = true contradicts logger = tensorboard" in refused.message
    monkeypatch.setitem(sys.modules, "trackio", None)
    refused = stage_runner(module, *flags, "--logger=trackio")
    assert refused.code == 2 and refused.message.count("\n") == 1
    for words in ("Trackio can't log this run", f"pip install -e '{ROOT}[trackio]'", "--logger=none does without it"):
        assert words in refused.message


# ---- what to type next


def parsers():
    """What reads the command line of each command of gpt-arc."""
    stages = {module.__name__.split(".")[-1]: partial(read_options, cls, None) for module, cls in OPTIONS.items()}
    return stages | {
        "train": lambda arguments: read_command_line(arguments, None),
        "sample": partial(parse_flags, SampleConfig, None),
        "eval": partial(parse_flags, evaluation.Options, None),
        "text": lambda arguments: parse_flags(text.Options, None, merge_inputs(arguments)),
    }


def commands_in(output):
    lines = output[output.index("next:\n") + 6 :].splitlines()
    return [shlex.split(line[line.index("python ") :]) for line in lines if line.strip()]


@pytest.mark.parametrize("script", ALL)
def test_the_commands_to_type_next_are_understood(script, workplace, stage_runner, output_of):
    module, *flags = ALL[script]
    commands = commands_in(stage_runner(module, *flags))
    assert len(commands) >= 2
    for program, path, *arguments in commands:
        name = Path(path).stem
        assert program == "python" and (name == "train" or (ROOT / path).is_file())
        parsers()[name](arguments)
        assert any(argument in ("run", "--resume=run", "--reward=run", "--image_encoder=run") for argument in arguments)
    if script == "train":
        program, name, *arguments = commands[0]
        assert output_of(entry_point(sample.main), "sample.py", *arguments, "--max_new_tokens=9")
        assert "finished step 16" in stage_runner(train, *commands[-1][2:])


@pytest.mark.parametrize("script", [text, tokenizer, decontaminate], ids=["text", "tokenizer", "decontaminate"])
def test_the_commands_to_type_after_preparing_are_understood(script, workplace, output_of):
    write("items.jsonl", [{"words": "a question that is nowhere in the book and has more than thirteen words"}])
    write("book.jsonl", [{"words": "one two three four five six seven eight nine ten " * 9}] * 9)
    flags = {
        text: ["--input", "book.jsonl", "--field=words", "--name=book", "--tokenizer=char", "--split=tail"],
        tokenizer: ["--input", "book.jsonl", "--field=words", "--name=book", "--vocab_size=270"],
        decontaminate: ["clean", "--input", "book.jsonl", "--field=words", "--items=items.jsonl", "--item_fields=words"]
        + ["--output=clean.jsonl"],
    }[script]
    commands = commands_in(output_of(entry_point(script.main), f"prepare/{script.__name__}.py", *flags))
    for program, path, *arguments in commands:
        assert program == "python" and (ROOT / path).is_file()
        name = Path(path).stem
        if name == "train":
            arguments[0] = str(ROOT / arguments[0])
        parsers()[name](arguments)
    if script is not text:
        changed = ("--split=tail", "--name=new", *["--tokenizer=char"] * (script is decontaminate))
        assert "data/new: " in output_of(entry_point(text.main), "prepare/text.py", *commands[0][2:], *changed)


# ---- a loss that doesn't move


def test_a_loss_moves_if_it_changes_by_more_than_its_noise():
    noise = random.Random(0)
    steps = range(60)
    assert movement([3 - 0.02 * i + noise.gauss(0, 0.1) for i in steps]) == -1
    assert movement([3 + 0.02 * i + noise.gauss(0, 0.1) for i in steps]) == 1
    assert movement([3 - 0.0004 * i for i in steps]) == 0  # half a hundredth
    still = [movement([0.7 + noise.gauss(0, 0.1) for _ in steps]) for _ in range(400)]
    assert still.count(0) > 370  # two standard errors leave out 4.6%, of which a hundredth takes some
    slow = [movement([0.7 - 0.002 * i + noise.gauss(0, 0.05) for i in steps]) for _ in range(400)]
    assert slow.count(-1) > 390


@pytest.mark.parametrize("script", ["sft", "reward", "dpo", "finetune"])
def test_a_loss_that_does_not_move_gets_a_line(script, workplace, stage_runner, monkeypatch):
    module, *flags = STAGES[script]
    write("clear.jsonl", [{"prompt": "h", "chosen": text, "rejected": text[::-1]} for text in ("ab", "ac", "bc")] * 4)
    flags += ["--epochs=50", "--batch_size=4", "--val_fraction=0"]
    flags += ["--train=clear.jsonl"] * (script in ("reward", "dpo"))
    flags += ["--residual_dropout=0"] * (script == "sft")
    flags += ["--language_weight=0"] * (script == "finetune")

    def interrupted(update, *more):
        with monkeypatch.context() as patched:
            interrupt_at(patched, update)
            return stage_runner(module, *more).output

    still = interrupted(40, *flags, "--learning_rate=1e-9", "--out_dir=still")
    assert still.count("try --learning_rate=1e-08") == 1 and "the loss hasn't moved in" in still
    learning = interrupted(40, *flags, "--learning_rate=2e-2", "--out_dir=learning", "--schedule=constant")
    assert "the loss has" not in learning
    if script == "sft":
        assert "the loss has" not in interrupted(5, *flags, "--learning_rate=1e-9", "--out_dir=halves")
        assert "the loss hasn't moved in" in interrupted(40, "--resume=halves")
