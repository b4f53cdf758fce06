"""stages/sft.py as a user runs it: what it learns from conversations, resuming, refusals."""

import json
import math
import random
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt_arc.chat.format import Turn, load_chat
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.settings import Sampling
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.optim import Updater
from gpt_arc.weights.directory import load_config, load_model, save_model
from helpers import TEXT, assert_same_weights, command, interrupt_at, kill_at, lines_of, randomised, untimed, write
from model import GPT, GPTConfig
from stages import sft

LETTERS = CharTokenizer("abcdefgh")
USER, ASSISTANT, END = 9, 10, 11  # the template's tokens, after <|system|> = 8
QUICK = ("--device=cpu", "--dtype=float32", "--learning_rate=1e-2", "--batch_size=4", "--epochs=2")
TRAIN = ("base", "--train=train.jsonl", *QUICK)
STILL = ("--learning_rate=1e-30", "--residual_dropout=0")  # leaves the model unchanged


def toy(count, seed=0):
    """Questions of one to five letters; the answer is the letter after the last one, once or twice."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        prompt = "".join(draw.choices("abcdefg", k=draw.randrange(1, 6)))
        rows.append({"prompt": prompt, "response": "bcdefgh"["abcdefg".index(prompt[-1])] * draw.randrange(1, 3)})
    return rows


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(24, 8, 2, 2, 16)), LETTERS, "base")
    write("train.jsonl", toy(13))
    write("val.jsonl", toy(5, seed=1))
    return tmp_path


@pytest.fixture
def run(workplace, stage_runner):
    return partial(stage_runner, sft)


def answer(folder, question, tokens=8):
    model, tokenizer = load_model(folder)
    chat = load_chat(Path(folder), tokenizer)
    prompt = chat.prompt([Turn("user", question)])
    ended = {"stopped": lambda row, token: token == chat.end}
    return chat.decode(
        [s.tokens[0] for s in generate(model.eval(), [prompt], tokens, Sampling(temperature=0), **ended)]
    )


def test_a_model_learns_to_answer_and_to_end(run):
    write("train.jsonl", [{"prompt": a * n, "response": b} for a, b in zip("abcd", "hgfe") for n in (1, 2, 3)] * 10)
    flags = ("--epochs=12", "--batch_size=12", "--learning_rate=2e-2")
    output = run(*TRAIN, *flags, "--val_fraction=0", "--residual_dropout=0")
    for words in (
        "template       <|user|>{content}<|assistant|>{content}<|end|>",
        "train          120 conversations, 240 tokens of responses",
        "updates        120 of 12 conversations in 12 epochs",
        "finished step 120: out/sft/last",
    ):
        assert words in output
    assert [answer("out/sft/last", a * n) for a in "abcd" for n in (1, 3)] == list("hhggffee")
    lines = lines_of("out/sft")
    assert [line["step"] for line in lines] == list(range(1, 121))
    assert lines[-1]["train_loss"] < 0.05 < lines[0]["train_loss"]
    assert [line["tokens"] for line in lines] == list(range(24, 24 * 121, 24))


def test_the_preview_marks_what_is_scored(run, monkeypatch):
    write("train.jsonl", [{"q": "ab", "r": "cc"}, {"q": "a" * 30, "r": "b"}, {"q": "c", "r": ""}, {"q": "d", "r": "e"}])
    flags = ("base", "--train=train.jsonl", "--preview=3", "--columns", "prompt=q", "response=r")
    expected = [
        "train.jsonl, line 1",
        "<|user|>·a·b·<|assistant|>·[c·c·<|end|>]",
        "train.jsonl, line 2; dropped: too long",
        "train.jsonl, line 3",
        "<|user|>·c·<|assistant|>·[<|end|>]",
    ]
    assert run(*flags).splitlines() == expected and not Path("out").exists()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run(*flags).splitlines()[1] == "<|user|>·a·b·<|assistant|>·\033[32mc·c·<|end|>\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(*flags).splitlines() == expected


def test_a_quiet_run_shows_no_updates(run):
    write("train.jsonl", [{"prompt": "ab", "response": "cc"}] * 8)
    flags = ("--epochs=2", "--batch_size=4", "--learning_rate=1e-3")
    assert "step 4 of 4: loss" in run(*TRAIN, *flags, "--val_fraction=0", "--out_dir=shown")
    quiet = run(*TRAIN, *flags, "--val_fraction=0.25", "--out_dir=quiet", "--quiet")
    assert " of 4: loss" not in quiet and "finished step 4: quiet/best (step " in quiet
    lowest = min(line["val_loss"] for line in lines_of("quiet") if "val_loss" in line)
    assert f", quiet/last; best val loss {lowest:.4f}\n" in quiet
    assert re.search(r"^trained        .* seconds?, 36 tokens, [\d,]+ tokens/s$", quiet, re.MULTILINE)
    assert " of 4: loss" not in run("--resume=quiet", "--quiet")


# ---- the loss


def losses_one_by_one(model, rows):
    """The loss of each token of each response given everything before it, from tokens put together by hand."""
    for row in rows:
        prompt = [USER, *LETTERS.encode(row["prompt"]), ASSISTANT]
        response = [*LETTERS.encode(row["response"]), END]
        for i, token in enumerate(response):
            yield -model(torch.tensor([prompt + response[:i]]))[0, -1].log_softmax(-1)[token]


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_mean_over_response_tokens(run, packing):
    rows = [*toy(9), {"prompt": "abc", "response": ""}]  # an empty response has one token, its end
    write("train.jsonl", rows)
    randomised(model := load_model("base")[0])
    save_model(model, LETTERS, "base")
    flags = (
        f"--packing={packing}",
        "--val=val.jsonl",
        "--epochs=1",
        "--batch_size=5",
        "--gradient_accumulation_steps=2",
    )
    run(*TRAIN, *STILL, *flags)
    (line,) = lines_of("out/sft")
    model = load_model("out/sft/last")[0].eval()
    losses = list(losses_one_by_one(model, rows))
    assert line["tokens"] == len(losses) == sum(len(row["response"]) + 1 for row in rows)
    mean = torch.stack(losses).mean()
    assert line["train_loss"] == pytest.approx(mean.item(), rel=1e-5)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(mean, list(model.parameters()))]).norm()
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    of_val = [loss.item() for loss in losses_one_by_one(model, toy(5, seed=1))]
    assert line["val_loss"] == pytest.approx(sum(of_val) / len(of_val), rel=1e-5)


def test_empty_responses_teach_the_model_to_end_at_once(run):
    write("train.jsonl", [{"prompt": "a", "response": ""}] * 80)
    run(*TRAIN, "--epochs=2", "--val_fraction=0", "--residual_dropout=0")
    lines = lines_of("out/sft")
    assert [line["tokens"] for line in lines] == [4 * line["step"] for line in lines]
    assert all(math.isfinite(line["train_loss"]) for line in lines) and lines[-1]["train_loss"] < 0.1
    assert answer("out/sft/last", "a") == ""


def test_conversations_that_the_assistant_begins(run):
    save_model(GPT(GPTConfig(24, 9, 2, 2, 16)), CharTokenizer("\nabcdefgh"), "base")
    write("train.jsonl", [{"messages": [{"role": "assistant", "content": text}]} for text in ("", "ab", "", "a")])
    run(*TRAIN, "--template=plain", "--val_fraction=0")
    assert [line["tokens"] for line in lines_of("out/sft")] == [7, 14]


# ---- batches and processes


def test_batching_and_processes_change_only_rounding(run):
    """13 conversations in updates of 4, so the last update has one, and one of two processes has none."""
    flags = (*TRAIN, "--residual_dropout=0", "--val=val.jsonl", "--learning_rate=1e-3", "--adam_eps=1e-4")
    run(*flags, "--out_dir=whole")
    ways = {
        "parts": ("--batch_size=1", "--gradient_accumulation_steps=4"),
        "padded": (
            "--packing=False",
            "--batch_size=2",
            "--gradient_accumulation_steps=2",
            "--activation_checkpointing=True",
        ),
    }
    for name, way in ways.items():
        run(*flags, *way, f"--out_dir={name}")
    several = ("--batch_size=1", "--gradient_accumulation_steps=4", "--backend=gloo", "--out_dir=two")
    result = command("stages/sft.py", *flags, *several, processes=2)
    assert result.returncode == 0 and result.stdout.count("finished step 8") == 1, result.stderr
    for name in (*ways, "two"):
        assert_same_weights("whole/last", f"{name}/last", rtol=1e-4, atol=1e-6)
        for expected, line in zip(lines_of("whole"), lines_of(name), strict=True):
            assert line == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}
    moved = (
        load_file("whole/last/model.safetensors")["blocks.0.mlp.up.weight"]
        - load_file("base/model.safetensors")["blocks.0.mlp.up.weight"]
    )
    assert moved.abs().max() > 1e-3


@pytest.mark.slow
def test_shards_train_as_one_process_and_resume(run):
    flags = (*TRAIN, "--residual_dropout=0", "--val=val.jsonl", "--learning_rate=1e-3", "--adam_eps=1e-4")
    run(*flags, "--out_dir=whole")
    several = ("--batch_size=1", "--gradient_accumulation_steps=4", "--backend=gloo", "--out_dir=shards")
    result = command("stages/sft.py", *flags, *several, "--parallel=fsdp", processes=2, torchrun=True)
    assert result.returncode == 0, result.stderr
    assert_same_weights("whole/last", "shards/last", rtol=1e-4, atol=1e-6)
    for expected, line in zip(lines_of("whole"), lines_of("shards"), strict=True):
        assert line == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}
    if Path("shards/best").readlink() != Path("shards/last").readlink():  # a checkpoint before the end
        Path("shards/last").unlink()
        Path("shards/last").symlink_to(Path("shards/best").readlink())
    result = command("stages/sft.py", "--resume=shards", processes=2, torchrun=True)
    assert result.returncode == 0, result.stderr
    assert_same_weights("whole/last", "shards/last", rtol=1e-4, atol=1e-6)


# ---- interrupted runs


def test_a_finished_run_says_how_to_go_on(run):
    assert "is finished after" not in run(*TRAIN)
    assert json.loads(Path("out/sft/run.json").read_text())["steps"] == 6
    message = "out/sft is finished after 6 updates: to train it further, start a new run from it"
    assert message in run("--resume=out/sft")


@pytest.mark.parametrize("updates", [2, 4])  # within an epoch and at its end
def test_an_interrupted_run_resumes_exactly(run, monkeypatch, updates):
    flags = (*TRAIN, "--val=val.jsonl")
    run(*flags, "--out_dir=whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, updates - 1)  # the next update notices it
        stopped = run(*flags, "--out_dir=halves")
    assert stopped.code == 130
    assert f"stopped after step {updates}, saved; resume with: python sft.py --resume=halves" in stopped.output
    assert f"halves, from step {updates}" in run("halves", "--resume=True")
    for name in ("last", "best"):
        assert_same_weights(f"whole/{name}", f"halves/{name}")
        assert Path(f"whole/{name}").readlink() == Path(f"halves/{name}").readlink()
    assert lines_of("whole") == lines_of("halves")
    whole, halves = (load_state(Path(folder) / "last") for folder in ("whole", "halves"))
    assert untimed([whole["progress"]]) == untimed([halves["progress"]])


def test_a_killed_run_resumes_from_its_last_epoch(run, monkeypatch):
    flags = (*TRAIN, "--val=val.jsonl")
    kill_at(7, "stages/sft.py", *flags, "--out_dir=killed")
    assert len(lines_of("killed")) == 6
    assert "killed, from step 4" in run("killed", "--resume=True")
    run(*flags, "--out_dir=whole")
    assert_same_weights("whole/last", "killed/last")
    assert lines_of("whole") == lines_of("killed")


def test_resuming_restarts_a_run_without_checkpoint_and_leaves_a_finished_one(run, monkeypatch):
    run(*TRAIN, "--out_dir=whole")
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Updater, "update", lambda *args: 1 / 0)
        patched.setattr(sys, "argv", ["sft.py", *TRAIN, "--out_dir=broken"])
        sft.main()
    assert not Path("broken/last").exists()
    run("broken", "--resume=True")
    assert_same_weights("whole/last", "broken/last")
    before = Path("whole/last/model.safetensors").read_bytes()
    assert "finished step 6" in run("whole", "--resume=True")
    assert Path("whole/last/model.safetensors").read_bytes() == before


def test_resuming_refuses_changed_data_and_settings(run, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        run(*TRAIN, "--out_dir=stopped", "--val=val.jsonl")
    refused = run("stopped", "--resume=True", "--epochs=9")
    assert refused.code == 2 and "--epochs can't be changed" in refused.message
    for name in ("val", "train"):
        content = Path(f"{name}.jsonl").read_text()
        write(f"{name}.jsonl", toy(13, seed=7))
        refused = run("stopped", "--resume=True")
        assert refused.code == 2 and "stopped was started on other data" in refused.message
        Path(f"{name}.jsonl").write_text(content)
    assert "finished step 8" in run("stopped", "--resume=True")


# ---- 16 bits


def test_an_overflowing_update_is_repeated(run, monkeypatch):
    """float16's loss scale begins too large here and is halved until the gradients are finite."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**26, enabled=enabled)
    )
    run(*TRAIN, "--dtype=float16", "--residual_dropout=0", "--out_dir=half", "--val_fraction=0", "--adam_eps=1e-4",
        "--learning_rate=1e-3")  # fmt: skip
    assert load_state(Path("half/last"))["progress"]["skipped"] > 3
    assert [line["step"] for line in lines_of("half")] == list(range(1, 9))
    run(
        *TRAIN,
        "--residual_dropout=0",
        "--out_dir=single",
        "--val_fraction=0",
        "--adam_eps=1e-4",
        "--learning_rate=1e-3",
    )
    assert [line["train_loss"] for line in lines_of("half")] == pytest.approx(
        [line["train_loss"] for line in lines_of("single")], rel=5e-3
    )


def test_a_non_finite_loss_ends_the_run(run):
    model = load_model("base")[0]
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0, 0] = torch.nan
    save_model(model, LETTERS, "base")
    refused = run(*TRAIN)
    message = "update 1 is not finite, there is no checkpoint yet: lower learning_rate"
    assert refused.code == 1 and message in refused.message


# ---- published settings, checkpoints and tokens


def test_the_published_settings(run):
    """InstructGPT's: 16 epochs, a cosine down to a tenth, residual dropout of .2 (arXiv:2203.02155, appendix C.1).

    The learning rate follows from the model's size.
    """
    run("base", "--train=train.jsonl", "--device=cpu", "--dtype=float32")
    lines, updates = lines_of("out/sft"), 16 * math.ceil(12 / 8)  # 5% of 13 conversations is one
    rate = json.loads(Path("out/sft/run.json").read_text())["options"]["learning_rate"]
    assert rate == pytest.approx(1e-5 * math.sqrt(1.2e9 / load_model("base")[0].num_parameters(embeddings=False)), 0.05)
    assert len(lines) == updates == 32
    for line in lines:
        fallen = 0.5 * (1 + math.cos(math.pi * (line["step"] - 1) / updates))
        assert line["learning_rate"] == pytest.approx(rate * (0.1 + 0.9 * fallen))
    config = load_config("out/sft/last")
    assert (config.dropout_of("residual"), config.dropout_of("attention"), config.dropout_of("embedding")) == (
        0.2,
        0,
        0,
    )
    run(*TRAIN, "--residual_dropout=None", "--epochs=1")
    assert load_config("out/sft-2/last").residual_dropout is None


def test_the_best_epoch_has_the_lowest_val_loss(run):
    contrary = [{"prompt": "a", "response": "h"}, {"prompt": "b", "response": "a"}]  # contradicts train.jsonl
    write("val.jsonl", contrary)
    output = run(*TRAIN, "--val=val.jsonl", "--epochs=8")
    val_losses = {line["step"]: line["val_loss"] for line in lines_of("out/sft") if "val_loss" in line}
    best = min(val_losses, key=val_losses.get)
    assert list(val_losses) == list(range(4, 33, 4)) and best < 32
    for step in (best, 32):  # without dropout
        losses = list(losses_one_by_one(load_model(f"out/sft/step-{step:08}")[0].eval(), contrary))
        assert val_losses[step] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert Path("out/sft/best").readlink() == Path(f"step-{best:08}") and f"out/sft/best (step {best})" in output
    assert len(list(Path("out/sft").glob("step-*"))) == 2
    assert "val            3 conversations" in run(*TRAIN, "--val_fraction=0.25", "--epochs=1")


@pytest.mark.parametrize("architecture", [{}, {"tied_head": False, "head_bias": True}])
def test_new_tokens_follow_the_old_ones(run, architecture):
    save_model(GPT(GPTConfig(24, 13, 2, 2, 16, **architecture)), LETTERS, "base")  # more rows than tokens
    run(*TRAIN, *STILL, "--epochs=1")
    base, taught = (load_file(f"{folder}/model.safetensors") for folder in ("base", "out/sft/last"))
    assert load_config("out/sft").vocab_size == 17
    for name, tensor in base.items():
        torch.testing.assert_close(taught[name][: len(tensor)], tensor, rtol=0, atol=1e-25)
        if name in ("token_embedding.weight", "head.weight", "head_bias"):
            assert len(taught[name]) == 17
    assert json.loads(Path("out/sft/last/chat.json").read_text())["added_tokens"] == {
        "<|system|>": 13, "<|user|>": 14, "<|assistant|>": 15, "<|end|>": 16,
    }  # fmt: skip


def test_a_model_keeps_its_template(run):
    run(*TRAIN, "--epochs=1")
    refused = run("out/sft", *TRAIN[1:], "--template=plain")
    assert refused.code == 2 and "out/sft keeps the template it has (chat.json)" in refused.message
    output = run("out/sft", *TRAIN[1:], *STILL, "--epochs=1")
    assert "template       <|user|>{content}<|assistant|>" in output
    assert_same_weights("out/sft/last", "out/sft-2/last", rtol=0, atol=1e-25)
    template_1, template_2 = (Path(f"{folder}/last/chat.json").read_text() for folder in ("out/sft", "out/sft-2"))
    assert template_1 == template_2


def test_csv_chatml_and_a_bpe(run):
    tokenizer = BPETokenizer.train([TEXT], 300)
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(64, tokenizer.vocab_size, 2, 2, 32)), tokenizer, "bpe")
    rows = [("2 times 3?", "6."), ("7 times 8?", "It is 56,\nnaïvely.")]
    Path("sums.csv").write_text("prompt,response\n" + "".join(f'"{a}","{b}"\n' for a, b in rows * 20))
    flags = ("--template=chatml", "--epochs=6", "--val_fraction=0", "--residual_dropout=0", *QUICK[:4])
    run("bpe", "--train=sums.csv", *flags)
    model, loaded = load_model("out/sft")
    assert loaded == tokenizer and model.config.vocab_size == tokenizer.vocab_size + 2
    assert [answer("out/sft/last", a, 40) for a, _ in rows] == [b for _, b in rows]


def test_long_conversations_are_cut_or_dropped_and_reported(run):
    turns = [{"role": role, "content": "a" * 7} for role in ("user", "assistant")]
    write("train.jsonl", [{"messages": turns * 2}, {"prompt": "a" * 30, "response": "b"}, *toy(3)])
    output = run(*TRAIN, "--epochs=1", "--val_fraction=0")
    assert "4 conversations" in output and "; 1 cut at a turn to fit the context; 1 dropped: too long" in output


# ---- settings from files, and mistakes


def test_later_files_and_flags_override_settings(run):
    Path("sft.toml").write_text('model = "base"\ntrain = "train.jsonl"\nepochs = 3\npacking = false\nseed = 7\n')
    Path("more.toml").write_text("epochs = 1\nval_fraction = 0.5\n")
    run("sft.toml", "more.toml", "--device=cpu", "--seed=8", "--dtype=float32")
    options = json.loads(Path("out/sft/run.json").read_text())["options"]
    shown = {name: options[name] for name in ("epochs", "packing", "seed", "val_fraction", "template")}
    assert shown == {"epochs": 1, "packing": False, "seed": 8, "val_fraction": 0.5, "template": "markers"}
    assert options["model"] == str(Path("base").resolve()) and options["train"] == str(Path("train.jsonl").resolve())
    save_model(GPT(GPTConfig(24, 8, 1, 2, 16)), LETTERS, "other")
    run("sft.toml", "other", "--epochs=1", "--device=cpu", "--dtype=float32")
    assert load_config("out/sft-2").n_layer == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "bad.toml: there is no setting epoch; did you mean epochs?"),
        ("[training]\nepochs = 3", "bad.toml: there is no setting training"),
        ('epochs = "many"', "bad.toml: "),
        ("epochs = 2.5", "bad.toml: "),
        ("epochs = true", "bad.toml: "),
        ("packing = 1", "bad.toml: "),
        ('dtype = "int8"', "bad.toml: "),
        ("epochs = 0", "epochs = 0 must be at least 1"),
        ('train = ["a.jsonl", "b.jsonl"]', 'bad.toml: train = ["a.jsonl", "b.jsonl"] must be a path in quotes'),
        ("[train]\nfile = 1", 'bad.toml: train = {"file": 1} must be a path in quotes'),
        ("epochs = ", "bad.toml is not valid TOML"),
        (None, "there is no config file bad.toml"),
    ],
)
def test_a_mistake_in_a_settings_file_is_reported_in_one_sentence(run, content, message):
    if content is not None:
        Path("bad.toml").write_text(content)
    refused = run("bad.toml", *TRAIN)
    assert refused.code == 2 and message in refused.message and refused.message.count("\n") == 1, refused.message
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "name a model to start from: python sft.py MODEL"),
        (("base",), "name the conversations to learn from by --train"),
        (("nowhere", *TRAIN[1:]), "there is no model directory nowhere"),
        (("mute", *TRAIN[1:]), "mute has no tokenizer, so it can't read text"),
        (("base", "--train=none.jsonl"), "there is no file none.jsonl"),
        (("base", "--train=odd.jsonl"), "odd.jsonl, line 1: there is no column response"),
        (("base", "--train=capital.jsonl"), "capital.jsonl, line 2: the character 'X'"),
        ((*TRAIN, "--val=none.jsonl"), "there is no file none.jsonl"),
        ((*TRAIN, "--val=long.jsonl"), "no conversation of the val split fits into the context of 24 tokens"),
        (("base", "--train=long.jsonl"), "no conversation of the train split fits into the context of 24 tokens"),
        (("base", "--train=one.jsonl", "--val_fraction=0.9"), "no conversation of the train split is left"),
        ((*TRAIN, "--template=chat"), "template = chat is neither a .toml file nor one of markers, chatml, plain"),
        ((*TRAIN, "--template=plain"), "the template's text '\\n\\n': the character '\\n'"),
        ((*TRAIN, "--residual_dropout=1"), "residual_dropout = 1 must be between 0 and 1, 1 excluded"),
        ((*TRAIN, "--val_fraction=1"), "val_fraction = 1 must be between 0 and 1, 1 excluded"),
        ((*TRAIN, "--learning_rate=0"), "learning_rate = 0 must be more than 0"),
        ((*TRAIN, "--final_learning_rate=2"), "final_learning_rate = 2 must be between 0 and 1"),
        ((*TRAIN, "--out_dir=base"), "out_dir = base holds the model that model names"),
        ((*TRAIN, "--epoch=2"), "there is no flag --epoch; did you mean --epochs?"),
        (("base", "--resume=True"), "base is not a run of sft.py that could go on"),
        (("run", "--resume=True"), "run is not a run of sft.py that could go on"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(run, flags, message):
    write("odd.jsonl", [{"prompt": "a"}])
    write("capital.jsonl", [*toy(1), {"prompt": "X", "response": "a"}])
    write("long.jsonl", [{"prompt": "a" * 30, "response": "b"}])
    write("one.jsonl", toy(1))
    save_model(GPT(GPTConfig(24, 8, 1, 2, 16)), None, "mute")
    Path("run").mkdir()
    Path("run/run.json").write_text("[]")
    refused = run(*flags)
    assert refused.code == 2 and message in refused.message and refused.message.count("\n") == 1, refused.message
    assert refused.message.startswith("sft.py: ") and not Path("out").exists()
