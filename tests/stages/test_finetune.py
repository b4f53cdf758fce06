"""stages/finetune.py as a user runs it: what a run learns and writes, how it resumes, what it refuses."""

import json
import math
import os
import random
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.finetuning.classifier import load_classifier, make_batch
from gpt_arc.finetuning.encoding import encode_examples
from gpt_arc.finetuning.examples import read_examples
from gpt_arc.training.log import read_metrics
from gpt_arc.training.optim import Updater
from gpt_arc.weights.directory import load_model, load_text_model, save_model
from helpers import assert_same_weights, command, lines_of, untimed, write, write_dataset
from model import GPT, GPTConfig
from stages import finetune

LETTERS = "abcdefghijklmnop "
ARCHITECTURE = dict(block_size=24, vocab_size=17, n_layer=2, n_head=2, n_embd=16)
TRAIN = ("base", "--train=train.jsonl", "--device=cpu", "--dtype=float32", "--batch_size=8", "--learning_rate=1e-2")
FINAL = ("last", "best", "report.json")
USE = ("out/finetune", "--device=cpu", "--dtype=float32")


def toy(count, seed):
    """Random texts; the label says whether they start with an a."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        start = "a" if i % 2 else draw.choice("bcdefgh")
        text = start + "".join(draw.choices(LETTERS[1:], k=draw.randrange(3, 12)))
        rows.append({"text": text, "label": "starts with a" if i % 2 else "no"})
    return rows


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder with the model directory `base`, and train, val and test files of the toy task."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**ARCHITECTURE, norm_position="post", init="gpt1", dropout=0.1))
    save_model(model, CharTokenizer(sorted(LETTERS)), "base")
    for seed, (split, count) in enumerate({"train": 40, "val": 16, "test": 16}.items()):
        write(f"{split}.jsonl", toy(count, seed))
    return tmp_path


@pytest.fixture
def run(workplace, stage_runner):
    return partial(stage_runner, finetune)


def predictions_of(directory, file):
    """The outcome for each example of a file, one by one, with the config and the labels."""
    classifier, tokenizer = load_classifier(directory)
    config = classifier.eval().config
    encoded = encode_examples(read_examples(Path(file), config.task, config.columns), config, tokenizer)
    outcomes = [classifier(*make_batch([s], [label])) for s, label in zip(encoded.sequences, encoded.labels)]
    return config, encoded.labels, outcomes


def test_a_run_learns_its_task_and_reports_its_quality(run):
    output = run(*TRAIN, "--val=val.jsonl", "--test=test.jsonl", "--epochs=12", "--classifier_dropout=0")
    folder = Path("out/finetune")
    report = json.loads((folder / "report.json").read_text())
    assert report["task"] == "classification" and report["classes"] == ["no", "starts with a"]
    assert report["examples"] == {"train": 40, "val": 16, "test": 16} and report["cut"]["train"] == 0
    assert len(report["epochs"]) == 12 and 1 <= report["best_epoch"] <= 12
    assert report["step"] == 5 * report["best_epoch"]
    assert report["test"]["accuracy"] == 1.0 and report["confusion_matrix"] == [[8, 0], [0, 8]]
    best = report["epochs"][report["best_epoch"] - 1]
    assert best["val_accuracy"] == max(epoch["val_accuracy"] for epoch in report["epochs"]) == 1.0
    assert best["val_loss"] == min(epoch["val_loss"] for epoch in report["epochs"] if epoch["val_accuracy"] == 1.0)
    for split, figures in (("test", report["test"]), ("val", {k[4:]: v for k, v in best.items() if k[:4] == "val_"})):
        config, labels, outcomes = predictions_of(folder / "best", f"{split}.jsonl")
        right = [outcome.logits.argmax().item() == label for outcome, label in zip(outcomes, labels)]
        losses = [[outcome.task_loss.item(), outcome.language_loss.item()] for outcome in outcomes]
        assert figures["accuracy"] == sum(right) / 16
        assert figures["loss"] == pytest.approx(sum(loss for loss, _ in losses) / 16, rel=1e-5)
        assert figures["language_loss"] == pytest.approx(sum(loss for _, loss in losses) / 16, rel=1e-5)
    assert config.columns.text_a == "text" and config.max_tokens == 24
    for words in ("parameters", "updates        60 of 8 examples in 12 epochs", "test: accuracy 1.0000", "/best"):
        assert words in output
    assert (folder / "best").readlink() == Path(f"step-{5 * report['best_epoch']:08}")
    assert (folder / "last").readlink() == Path("step-00000060")
    assert len(list(folder.glob("step-*"))) == 2 - (report["best_epoch"] == 12)
    assert load_model(folder)[0].config.vocab_size == 20
    assert json.loads((folder / "run.json").read_text())["options"]["epochs"] == 12

    updates = [line for line in read_metrics(folder / "metrics.jsonl") if "grad_norm" in line]
    assert [line["step"] for line in updates] == list(range(1, 61))
    for line in updates:
        assert line["learning_rate"] == pytest.approx(
            1e-2 * (min((line["step"] - 1) / 60 / 0.002, 1) * (1 - (line["step"] - 1) / 60))
        )
    means = [sum(line["train_loss"] for line in updates[5 * i : 5 * i + 5]) / 5 for i in range(12)]
    assert [epoch["loss"] for epoch in report["epochs"]] == pytest.approx(means, rel=1e-5)
    assert means[-1] < 0.1 < means[0]


@pytest.fixture
def trained(run):
    run(*TRAIN, "--val_fraction=0", "--epochs=8")
    return run


def test_a_trained_model_is_measured_and_used(trained):
    labelled = toy(6, 9)
    write("new.jsonl", [{"text": row["text"]} for row in labelled])
    config, labels, outcomes = predictions_of("out/finetune", "test.jsonl")
    right = sum(outcome.logits.argmax().item() == label for outcome, label in zip(outcomes, labels))
    assert f"test: accuracy {right / 16:.4f}" in trained(*USE, "--test=test.jsonl")
    assert "new.predictions.jsonl: 6 predictions" in trained(*USE, "--predict=new.jsonl", "--batch_size=4")
    lines = [json.loads(line) for line in Path("new.predictions.jsonl").read_text().splitlines()]
    write("known.jsonl", labelled)
    _, _, outcomes = predictions_of("out/finetune", "known.jsonl")
    for line, outcome in zip(lines, outcomes, strict=True):
        probabilities = dict(zip(config.classes, outcome.logits[0].softmax(0).tolist()))
        assert line["probabilities"] == pytest.approx(probabilities, abs=1e-5) and "label" not in line
        assert line["prediction"] == max(probabilities, key=probabilities.get)
    printed = trained(*USE, "--classify", labelled[0]["text"])
    assert json.loads(printed)["probabilities"] == pytest.approx(lines[0]["probabilities"], abs=1e-5)
    refused = trained("out/finetune", "--classify", "one", "two")
    assert refused.code == 2 and "classification takes one text" in refused.message


def test_columns_may_have_other_names(trained):
    write("other.jsonl", [{"content": row["text"], "verdict": row["label"]} for row in toy(16, 2)])
    shown = trained(*USE, "--test=test.jsonl")
    assert shown == trained(*USE, "--test=other.jsonl", "--text_a=content", "--label=verdict")


TASKS = {
    "entailment": {"premise": "abc", "hypothesis": "de", "label": "yes"},
    "similarity": {"text_a": "abc", "text_b": "de", "label": "yes"},
    "multiple_choice": {"context": "abc", "options": ["a", "b", "cd"], "label": "B"},
}


@pytest.mark.parametrize("flags", [(), ("--numbers=True",), ("--lstm=True",), ("--lora_rank=2",)])
@pytest.mark.parametrize("task", TASKS)
def test_each_task_is_trained_and_predicted(run, task, flags):
    row = TASKS[task]
    if "--numbers=True" in flags and task == "multiple_choice":
        assert run(*TRAIN, "--task", task, *flags).code == 2
        return
    labels = [0.5, 2] if "--numbers=True" in flags else ["A", 2] if task == "multiple_choice" else ["no", "yes"]
    write("train.jsonl", [row | {"label": label} for label in labels] * 4)
    output = run(*TRAIN, "--task", task, "--epochs=1", "--test=train.jsonl", "--predict=train.jsonl", *flags)
    assert "train.predictions.jsonl: 8 predictions" in output
    measured = json.loads(Path("out/finetune/report.json").read_text())["test"]
    assert ("pearson" if "--numbers=True" in flags else "accuracy") in measured
    lines = [json.loads(line) for line in Path("train.predictions.jsonl").read_text().splitlines()]
    kind = float if "--numbers=True" in flags else int if task == "multiple_choice" else str
    assert all(type(line["prediction"]) is kind and "label" not in line for line in lines)
    classifier, _ = load_classifier("out/finetune")
    assert classifier.config.lstm == ("--lstm=True" in flags)


def interrupt_after(monkeypatch, updates):
    """Sends this process a Ctrl-C so that the run ends after this many updates; the next update notices it."""
    updates_made, update = [], Updater.update

    def counted(self, *args):
        result = update(self, *args)
        updates_made.append(1)
        if len(updates_made) == updates - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(Updater, "update", counted)
    return updates_made


@pytest.mark.parametrize(
    ("updates", "flags"),
    [
        (3, ()),
        (7, ("--gradient_accumulation_steps=2", "--batch_size=4")),
        (5, ()),  # at the end of an epoch
        (10, ()),  # at the end of the last epoch
        (3, ("--lora_rank=2",)),
        (3, ("--freeze_trunk=True",)),
        (3, ("--transfer_blocks=1",)),
        (3, ("--lstm=True",)),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(run, monkeypatch, updates, flags):
    flags = (*TRAIN, "--epochs=2", "--val=val.jsonl", "--test=test.jsonl", *flags)
    run(*flags, "--out_dir=whole")
    with monkeypatch.context() as patched:
        interrupt_after(patched, updates)
        stopped = run(*flags, "--out_dir=halves")
    if updates < 10:
        assert stopped.code == 130 and f"stopped after step {updates}, saved; resume with" in stopped.output
        assert not Path("halves/report.json").exists()
        with monkeypatch.context() as patched:
            updates_made = interrupt_after(patched, 0)
            assert "test: accuracy" in run("halves", "--resume=True")
            assert len(updates_made) == 10 - updates
    for name in ("last", "best"):
        assert_same_weights(f"whole/{name}", f"halves/{name}")

    assert untimed(read_metrics(Path("whole/metrics.jsonl"))) == untimed(read_metrics(Path("halves/metrics.jsonl")))
    whole, halves = (json.loads(Path(folder, "report.json").read_text()) for folder in ("whole", "halves"))
    assert untimed(whole.pop("epochs")) == untimed(halves.pop("epochs")) and whole == halves


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("fsdp", ("--gradient_accumulation_steps=2",)),
        ("fsdp", ("--lora_rank=2", "--task=similarity", "--text_a=text", "--text_b=text")),
        ("ddp", ("--language_weight=0",)),  # the untied head has no part in the loss
    ],
)
def test_two_processes_train_as_one_and_resume(run, workplace, mode, flags):
    """37 examples in batches of 4: in the last one there is a process without an example."""
    save_model(GPT(GPTConfig(**ARCHITECTURE, tied_head=False, norm="rmsnorm")), CharTokenizer(sorted(LETTERS)), "base")
    write("train.jsonl", toy(37, 0))
    flags = (*TRAIN, "--classifier_dropout=0", "--val=val.jsonl", "--test=test.jsonl", "--learning_rate=1e-3", *flags)
    flags += ("--adam_eps=1e-4", "--epochs=2", "--batch_size=4")
    run(*flags, "--out_dir=whole")
    several = f"--parallel={mode}", "--out_dir=two"
    stopped = command("stages/finetune.py", *flags, *several, "--stop_after=1s", processes=2)
    assert "stopped after step 1, saved" in stopped.stdout, stopped.stdout + stopped.stderr
    result = command("stages/finetune.py", "--resume=two", processes=2)
    assert result.stdout.count("test: accuracy") == 1, result.stdout + result.stderr
    for expected, line in zip(lines_of("whole"), lines_of("two"), strict=True):
        assert line == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in expected.items()}
    assert_same_weights("whole/last", "two/last", rtol=0, atol=1e-5)
    whole, two = (json.loads(Path(folder, "report.json").read_text()) for folder in ("whole", "two"))
    assert two["confusion_matrix"] == whole["confusion_matrix"]
    assert two["test"] == pytest.approx(whole["test"], rel=1e-5)
    load_model("two")


def write_numbers():
    """Files of the toy task with numbers of mean 50 and standard deviation 10 as labels."""
    for seed, (split, count) in enumerate({"train": 40, "val": 16, "test": 16}.items()):
        rows = toy(count, seed)
        write(f"{split}.jsonl", [row | {"label": 40 if row["label"] == "no" else 60} for row in rows])


def test_numbers_are_learned_from_their_mean_in_their_own_units(run):
    write_numbers()
    splits = ("--val=val.jsonl", "--test=test.jsonl", "--predict=test.jsonl")
    run(*TRAIN, "--numbers=True", *splits, "--epochs=12", "--classifier_dropout=0")
    updates = [line for line in read_metrics(Path("out/finetune/metrics.jsonl")) if "grad_norm" in line]
    assert updates[0]["train_loss"] == pytest.approx(100)  # all labels lie 10 from the mean, which is predicted first
    report = json.loads(Path("out/finetune/report.json").read_text())
    assert report["epochs"][0]["loss"] < 110 and report["epochs"][-1]["val_mean_squared_error"] < 20
    predicted = [json.loads(line)["prediction"] for line in Path("test.predictions.jsonl").read_text().splitlines()]
    labels = [json.loads(line)["label"] for line in Path("test.jsonl").read_text().splitlines()]
    errors = sum((value - label) ** 2 for value, label in zip(predicted, labels)) / 16
    assert report["test"]["mean_squared_error"] == pytest.approx(errors, rel=1e-5)
    assert report["test"]["loss"] == pytest.approx(errors, rel=1e-5)
    config = json.loads(Path("out/finetune/best/classifier.json").read_text())
    assert (config["mean"], config["scale"]) == (50, 10)


@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_run_keeps_the_scale_of_its_numbers(run, monkeypatch, older):
    write_numbers()
    flags = (*TRAIN, "--numbers=True", "--epochs=2", "--val_fraction=0")
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        run(*flags, "--out_dir=halves")
    last = Path("halves/last")
    if older:  # a run of the version without scales
        content = json.loads((last / "classifier.json").read_text())
        del content["mean"], content["scale"]
        (last / "classifier.json").write_text(json.dumps(content))
        (last / "manifest.json").unlink()
    run("--resume=halves")
    config = load_classifier(last)[0].config
    assert (config.mean, config.scale) == ((0, 1) if older else (50, 10))
    if not older:
        run(*flags, "--out_dir=whole")
        assert_same_weights("whole/last", last)


@pytest.mark.parametrize("untied", [False, True])
def test_special_tokens_depend_only_on_the_seed(run, untied):
    if untied:
        save_model(GPT(GPTConfig(**ARCHITECTURE, tied_head=False)), CharTokenizer(sorted(LETTERS)), "base")
    for seed, folder in ((1, "one"), (1, "again"), (2, "other")):
        run(*TRAIN, "--epochs=1", "--freeze_trunk=True", f"--seed={seed}", f"--out_dir={folder}")
    assert_same_weights("one/last", "again/last")
    seed_1, seed_2, base = (load_file(f"{folder}/model.safetensors") for folder in ("one/last", "other/last", "base"))
    for name in ["token_embedding.weight"] + ["head.weight"] * untied:
        assert torch.equal(seed_1[name][:17], base[name]) and not torch.equal(seed_1[name][17:], seed_2[name][17:])


@pytest.mark.parametrize("tied", [False, True])
def test_language_weight_0_leaves_out_the_language_loss(run, tied):
    config = GPTConfig(**ARCHITECTURE, tied_head=tied, head_bias=True)
    save_model(GPT(config), CharTokenizer(sorted(LETTERS)), "base")
    output = run(*TRAIN, "--epochs=1", "--language_weight=0")
    assert isinstance(output, str)
    assert all(line.get("language_loss", 0) == 0 for line in read_metrics(Path("out/finetune/metrics.jsonl"))[:4])


def test_from_scratch_keeps_no_weights_and_frozen_trunks_keep_all(run):
    base = load_file("base/model.safetensors")
    for flags in (("--from_scratch=True",), ("--freeze_trunk=True",), ("--lora_rank=2",)):
        run(*TRAIN, "--epochs=1", "--learning_rate=1e-5", "--out_dir=run", "--overwrite=True", *flags)
        tensors = load_file("run/last/model.safetensors")
        matrices = {name for name, tensor in tensors.items() if tensor.dim() > 1}
        far = {name for name in matrices if (tensors[name][: len(base[name])] - base[name]).abs().max() > 0.01}
        equal = {name for name in matrices if torch.equal(tensors[name][: len(base[name])], base[name])}
        if flags[0].startswith("--from"):
            assert far == matrices
        elif flags[0].startswith("--freeze"):
            assert equal == matrices
            initial = tensors["token_embedding.weight"][17:]
        else:
            assert not far and equal == {name for name in matrices if not name.startswith("blocks")}
            assert not torch.equal(tensors["token_embedding.weight"][17:], initial)  # the new tokens learn


def test_a_classifier_may_be_trained_on_another_task(trained):
    write("pairs.jsonl", [TASKS["entailment"] | {"label": label} for label in ("no", "yes")] * 4)
    trained("out/finetune", "--task=entailment", "--train=pairs.jsonl", "--epochs=1", "--learning_rate=1e-7")
    before, after = (load_classifier(f"out/{name}")[0] for name in ("finetune", "finetune-2"))
    assert after.config.task == "entailment" and after.config.special == before.config.special
    torch.testing.assert_close(after.trunk.state_dict(), before.trunk.state_dict(), rtol=0, atol=1e-5)


def test_an_lstm_is_pre_trained_and_stays_an_lstm_in_the_next_task(run, workplace):
    tokenizer = CharTokenizer(sorted(LETTERS))
    tokens = tokenizer.encode("".join("abcd efgh " * 400))
    write_dataset(workplace / "data" / "letters", tokenizer, {"train": tokens, "val": tokens[:100]})
    flags = ("--lstm=True", "--lstm_dataset=letters", "--lstm_iters=100")
    output = run(*TRAIN, "--epochs=1", *flags)
    (loss,) = re.findall(r"LSTM +pre-trained to a loss of ([.\d]+) nats a token", output)
    assert float(loss) < 2.6 < math.log(17)
    run("out/finetune", *TRAIN[1:], "--epochs=1", "--learning_rate=1e-7", "--dropout=0.2")
    before, after = (load_classifier(f"out/{name}")[0] for name in ("finetune", "finetune-2"))
    assert after.config.lstm and after.trunk.config.dropout == 0.2
    torch.testing.assert_close(after.trunk.state_dict(), before.trunk.state_dict(), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="is a classifier with an LSTM, which only stages/finetune.py can use"):
        load_text_model("out/finetune")  # as sample.py and eval.py do
    for flag in ("--lora_rank=2", "--transfer_blocks=1"):
        assert run("out/finetune", *TRAIN[1:], flag).code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("base",), "there is nothing to do: name --train, --test, --predict or --classify"),
        (("--train=train.jsonl",), "name a model to start from: python finetune.py MODEL"),
        (("--test=test.jsonl",), "name a model to start from: python finetune.py MODEL"),
        (("base", "--test=test.jsonl"), "is a model without a classifier's head: train one with --train FILE"),
        (("nowhere", "--train=train.jsonl"), "there is no model directory nowhere"),
        (("base", "--train=none.jsonl"), "there is no file none.jsonl"),
        ((*TRAIN, "--text_a=review"), "line 1: there is no column review; the columns are: text, label"),
        ((*TRAIN, "--label=stars"), "line 1: there is no column stars; the columns are: text, label"),
        ((*TRAIN, "--task=entailment"), "line 1: there is no column premise; the columns are: text, label"),
        (
            (*TRAIN, "--val=odd.jsonl"),
            "odd.jsonl, line 2: the label 'maybe' is not one of the classes trained on: no, ",
        ),
        (
            (*TRAIN, "--test=odd.jsonl"),
            "odd.jsonl, line 2: the label 'maybe' is not one of the classes trained on: no, ",
        ),
        ((*TRAIN, "--numbers=True"), "train.jsonl, line 1: the label 'no' is not a number"),
        (("base", "--train=same.jsonl"), "every example has the label 'no': there is nothing to learn"),
        (("base", "--train=capital.jsonl"), "capital.jsonl, line 1: the character 'A'"),
        ((*TRAIN, "--freeze_trunk=True", "--language_weight=0.5"), "leave language_weight or freeze_trunk out"),
        ((*TRAIN, "--lora_alpha=8"), "lora_alpha = 8.0 is for adapters: set lora_rank, or leave lora_alpha out"),
        ((*TRAIN, "--freeze_trunk=True", "--lora_rank=2"), "freeze_trunk and lora_rank exclude each other: choose one"),
        ((*TRAIN, "--lstm=True", "--transfer_blocks=0"), "lstm and transfer_blocks exclude each other: choose one"),
        ((*TRAIN, "--max_tokens=25"), "max_tokens = 25 is more than the model's context, 24"),
        ((*TRAIN, "--max_tokens=4"), "max_tokens = 4 must be at least 8"),
        ((*TRAIN, "--transfer_blocks=3"), "transfer_blocks = 3, but the model has 2 blocks"),
        (("mute", "--train=train.jsonl"), "mute has no tokenizer, so it can't read text"),
        ((*TRAIN, "--lstm=True", "--lstm_iters=2"), "lstm_dataset and lstm_iters go together"),
        ((*TRAIN, "--lstm=True", "--lstm_iters=2", "--lstm_dataset=none"), "there is no prepared dataset of that name"),
        ((*TRAIN, "--epochs=0"), "epochs = 0 must be at least 1"),
        ((*TRAIN, "--warmup=0"), "warmup = 0 must be between 0 and 1, 0 excluded"),
        ((*TRAIN, "--out_dir=base"), "out_dir = base holds the model that model names"),
        (("base", "--resume=True"), "base is not a run of finetune.py that could go on"),
        ((*TRAIN, "--epoch=2"), "there is no flag --epoch; did you mean --epochs?"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(run, flags, message):
    write("odd.jsonl", [{"text": "abc", "label": "no"}, {"text": "abc", "label": "maybe"}])
    write("same.jsonl", [{"text": "abc", "label": "no"}] * 3)
    write("capital.jsonl", [{"text": "Abc", "label": "no"}, {"text": "abc", "label": "yes"}])
    save_model(GPT(GPTConfig(**ARCHITECTURE)), None, "mute")
    refused = run(*flags)
    assert refused.code == 2 and message in refused.message and refused.message.count("\n") == 1
    assert refused.message.startswith("finetune.py: ") and not Path("out").exists()


def test_what_one_process_does_is_refused_to_several(trained, monkeypatch):
    monkeypatch.setattr(finetune, "WORLD_SIZE", 2)
    refused = trained(*USE, "--classify", "abc")
    assert refused.code == 2 and "a fine-tuned model is used in one process: start it with python" in refused.message
    refused = trained(*TRAIN, "--lstm=True", "--out_dir=lstm")
    assert refused.code == 2 and "an LSTM is trained in one process: start it with python" in refused.message


def test_resuming_refuses_changed_examples(run, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        run(*TRAIN, "--epochs=2")
    write("train.jsonl", toy(30, 0))
    refused = run("out/finetune", "--resume=True")
    assert refused.code == 2 and "was started on other data or another model" in refused.message


# ---- what a run must not overwrite or accept silently


def test_overwriting_spares_the_model_and_other_runs(run):
    refused = run(*TRAIN, "--out_dir=base", "--overwrite=True")
    assert (
        refused.code == 2
        and "holds the model that model names" in refused.message
        and Path("base/config.json").exists()
    )
    Path("out/other").mkdir(parents=True)
    Path("out/other/run.json").write_text('{"config": "a", "overrides": {}}')
    refused = run(*TRAIN, "--out_dir=out/other", "--overwrite=True")
    assert refused.code == 2 and "holds a run of train.py" in refused.message


def test_a_run_killed_before_its_first_checkpoint_restarts(run):
    run(*TRAIN, "--out_dir=whole")
    run(*TRAIN, "--out_dir=killed")
    for path in (
        *Path("killed").glob("step-*/*"),
        *Path("killed").glob("step-*"),
        *map(Path("killed").joinpath, FINAL),
    ):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    run("killed", "--resume=True")
    assert Path("killed/best/model.safetensors").read_bytes() == Path("whole/best/model.safetensors").read_bytes()


def test_resuming_refuses_changed_labels_and_options(run, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        run(*TRAIN, "--out_dir=stopped")
    refused = run("stopped", "--resume=True", "--epochs=9")
    assert refused.code == 2 and "--epochs can't be changed" in refused.message
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    write("train.jsonl", [row | {"label": "yes" if row["label"] == "no" else "no"} for row in rows])
    refused = run("stopped", "--resume=True")
    assert refused.code == 2 and "was started on other data or another model" in refused.message


def test_a_missing_file_to_predict_is_reported_before_training(run):
    refused = run(*TRAIN, "--predict=absent.jsonl")
    assert refused.code == 2 and "there is no file absent.jsonl" in refused.message and not Path("out").exists()


def test_predictions_replace_files_only_with_overwrite(trained):
    write("new.jsonl", [{"text": "abc", "label": -1}])  # labels of rows to predict are ignored
    trained(*USE, "--predict=new.jsonl")
    refused = trained(*USE, "--predict=new.jsonl")
    assert refused.code == 2 and "new.predictions.jsonl is there already" in refused.message
    assert "1 prediction\n" in trained(*USE, "--predict=new.jsonl", "--overwrite=True")
    assert "1 prediction\n" in trained(*USE, "--predict=new.jsonl", "--output=other.jsonl")


def test_classes_only_in_held_out_examples_count(run):
    write("train.jsonl", [{"text": "abc", "label": f"class {i}"} for i in range(40)])
    assert "classes        40" in run(*TRAIN, "--val_fraction=0.5", "--epochs=1")


def test_training_options_need_training_data(trained):
    refused = trained("out/finetune", "--learning_rate=3", "--classify", "abc")
    assert refused.code == 2 and "--learning_rate is for training" in refused.message
