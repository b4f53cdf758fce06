"""stages/sft.py on conversations with images: learning, parts, packing, processes, resuming, refusals."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from gpt_arc.chat.files import Conversation
from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.training.log import read_metrics
from gpt_arc.vision.data import (
    ImageConversation,
    encode_image_conversations,
    image_batch,
    read_image_conversations,
    with_images,
)
from gpt_arc.vision.images import Preprocessing
from gpt_arc.weights.directory import save_model
from helpers import assert_same_weights, command, interrupt_at, write
from model import GPT, GPTConfig
from stages import dpo, finetune, ppo, reward, sft
from tools import export, upcycle

LETTERS = CharTokenizer("abcdefgh")
COLOURS = {"a": "red", "b": "lime", "c": "blue", "d": "white", "e": "black"}
NEW = "image_size = 8\npatch_size = 4\nn_layer = 1\nn_head = 2\nn_embd = 16\n"
QUICK = ("--device=cpu", "--dtype=float32", "--learning_rate=1e-2", "--batch_size=4", "--epochs=2", "--val_fraction=0")
TRAIN = ("base", "--train=train.jsonl", "--image_encoder=new.toml", "--residual_dropout=0", *QUICK)


def rows():
    """Questions about one image, about two, and about none."""
    one = [{"image": f"pictures/{a}.png", "prompt": "h", "response": a} for a in COLOURS]
    pairs = [("a", "b"), ("b", "a"), ("c", "a"), ("e", "d")]
    two = [
        {"images": [f"pictures/{a}.png", f"pictures/{b}.png"], "prompt": "<image>g<image>f", "response": b + a}
        for a, b in pairs
    ]
    return [*one, *two, {"prompt": "f", "response": "g"}, {"prompt": "g", "response": "f"}]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(24, 8, 2, 2, 16)), LETTERS, "base")
    Path("pictures").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(f"pictures/{name}.png")
    write("train.jsonl", rows())
    Path("new.toml").write_text(NEW)


@pytest.fixture
def run(workplace, stage_runner):
    return partial(stage_runner, sft)


def losses(folder):
    return [line["train_loss"] for line in read_metrics(Path(folder) / "metrics.jsonl")]


def weights(folder):
    return {**load_file(f"{folder}/last/model.safetensors"), **load_file(f"{folder}/last/vision.safetensors")}


def test_a_model_learns_to_tell_images_apart(run):
    flags = [flag for flag in TRAIN if flag != "--epochs=2"] + ["--epochs=1", "--batch_size=8", "--min_lr=5e-3"]
    write("train.jsonl", rows()[:5] * 100)
    run(*flags, "--out_dir=seen")
    write("train.jsonl", [row | {"image": "pictures/a.png"} for row in rows()[:5] * 20])
    run(*flags, "--out_dir=blind")
    assert losses("seen")[-1] < 0.1 < 0.5 < losses("blind")[-1]


def test_only_the_parts_with_a_rate_are_trained(run):
    run(*TRAIN, "--text_rate=0", "--encoder_rate=0", "--prefix_attention=True", "--out_dir=first")
    run("first", *TRAIN[1:2], *QUICK, "--encoder_rate=0.5", "--residual_dropout=0", "--out_dir=second")
    assert json.loads(Path("second/last/vision.json").read_text())["prefix_attention"]
    before, first, second = load_file("base/model.safetensors"), weights("first"), weights("second")
    assert all(torch.equal(before[name], first[name][: len(before[name])]) for name in before)
    for name in first:
        assert not torch.equal(first[name], second[name]) or "attention.qkv.bias" in name, name
    refused = run("first", *TRAIN[1:], "--out_dir=third")
    assert refused.code == 2 and "first has an image encoder" in refused.message


def test_a_part_s_rate_multiplies_the_learning_rate(run):
    """Adam's first step is the learning rate in every weight with a gradient."""
    flags = ("--epochs=1", "--batch_size=16", "--schedule=constant", "--adam_eps=1e-20", "--grad_clip=0")
    run(*TRAIN, "--learning_rate=1e-30", "--out_dir=still", *flags)
    run(*TRAIN, "--learning_rate=1e-3", "--encoder_rate=0.5", "--projector_rate=2", "--out_dir=moved", *flags)
    still, moved = weights("still"), weights("moved")
    for name, rate in (
        ("encoder.patches.weight", 5e-4),
        ("projector.first.weight", 2e-3),
        ("blocks.0.mlp.up.weight", 1e-3),
    ):
        assert (moved[name] - still[name]).abs().max().item() == pytest.approx(rate, rel=1e-3)


def test_packing_batching_and_processes_change_only_rounding(run):
    flags = (*TRAIN, "--learning_rate=1e-3", "--adam_eps=1e-4")
    run(*flags, "--out_dir=whole")
    run(*flags, "--packing=False", "--out_dir=padded")
    run(*flags, "--batch_size=1", "--gradient_accumulation_steps=4", "--out_dir=parts")
    several = ("--batch_size=1", "--gradient_accumulation_steps=4", "--backend=gloo", "--out_dir=two")
    result = command("stages/sft.py", *flags, *several, processes=2)
    assert result.returncode == 0, result.stderr
    for name in ("padded", "parts", "two"):
        assert losses(name) == pytest.approx(losses("whole"), rel=1e-4)
        torch.testing.assert_close(weights(name), weights("whole"), rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_resumes_exactly(run, monkeypatch):
    run(*TRAIN, "--residual_dropout=0.1", "--out_dir=whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        assert run(*TRAIN, "--residual_dropout=0.1", "--out_dir=halves").code == 130
    run("halves", "--resume=True")
    assert_same_weights("whole/last", "halves/last")
    assert losses("whole") == losses("halves")


def test_a_run_is_not_resumed_with_other_images(run, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        run(*TRAIN, "--out_dir=stopped")
    Image.new("RGB", (8, 8), "pink").save("pictures/c.png")
    refused = run("stopped", "--resume=True")
    assert refused.code == 2 and "stopped was started on other data" in refused.message


def test_a_preview_shows_where_images_are(run):
    output = run("base", "--train=train.jsonl", "--image_encoder=new.toml", "--preview=1")
    assert "<|user|>·<image>·<image>·<image>·<image>·h·<|assistant|>·[a·<|end|>]" in output


def test_images_that_no_encoder_reads_are_mentioned(run):
    write("train.jsonl", [row for row in rows() if "<image>" not in row["prompt"]])
    assert "images         ignored: name an --image_encoder" in run("base", "--train=train.jsonl", *QUICK)
    write("train.jsonl", rows()[-2:])
    output = run("base", "--train=train.jsonl", *QUICK, "--out_dir=text")
    assert "images" not in output and not Path("text/last/vision.json").exists()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "pictures/none.png"}, "none.png is missing"),
        ({"image": "../base/config.json"}, "outside the folder"),
        ({"image": "https://x.org/a.png"}, "is a URL"),
        ({"image": "new.toml"}, "new.toml is not a PNG, JPEG or WebP image"),
        ({"image": 3}, "is not the name of a file"),
        ({"images": "pictures/a.png"}, "images is not a list"),
        ({"images": ["pictures/a.png"], "image": "pictures/a.png"}, "can't stand side by side"),
        ({"images": ["pictures/a.png"] * 2, "prompt": "<image>h"}, "have 1 <image> for 2 images"),
        ({"prompt": "<image>h"}, "have 1 <image> for 0 images"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_rows_are_named_in_a_sentence(row, message, run):
    write("train.jsonl", [*rows()[:1], {"prompt": "h", "response": "a"} | row])
    refused = run(*TRAIN)
    assert refused.code == 2 and message in refused.message and "train.jsonl, line 2: " in refused.message
    assert refused.message.count("\n") == 1 and not Path("out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--image_encoder=nowhere",), "image_encoder = nowhere is neither"),
        (("--image_encoder=base",), 'model_type = "gpt-arc" is not an image encoder'),
        (("--image_encoder=new.toml", "--pixel_shuffle=3"), "pixel_shuffle = 3 doesn't divide the 2 patches"),
        (("--prefix_attention=True",), "prefix_attention is for a new image encoder: name an --image_encoder"),
        (("--pixel_shuffle=2",), "pixel_shuffle is for a new image encoder: name an --image_encoder"),
        (("--encoder_rate=0.5",), "encoder_rate and projector_rate are for images: name an --image_encoder"),
        (
            ("--image_encoder=new.toml", "--text_rate=0", "--encoder_rate=0", "--projector_rate=0"),
            "nothing would be trained",
        ),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(flags, message, run):
    refused = run("base", "--train=train.jsonl", *QUICK, *flags)
    assert refused.code == 2 and message in refused.message


# ---- the data


def test_images_stand_where_the_text_says_and_batches_renumber_them(workplace):
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)
    conversations = read_image_conversations(Path("train.jsonl"), (), 2)
    examples, _, _ = encode_image_conversations(conversations, chat, 30)
    user, assistant, end = (chat.ids[f"<|{name}|>"] for name in ("user", "assistant", "end"))
    assert examples[0].tokens == [user, -1, -2, 7, assistant, 0, end]
    assert examples[5].tokens == [user, -1, -2, 6, -3, -4, 5, assistant, 1, 0, end]
    assert examples[5].scored == [False] * 8 + [True] * 3
    batch = [examples[i] for i in (0, 9, 5)]
    tokens, targets, documents, lengths, pixels = image_batch(batch, None, Preprocessing("stretch"), 4)
    assert tokens[0].tolist()[:4] == [user, -1, -2, 7] and tokens[2].tolist()[:7] == [user, -3, -4, 6, -5, -6, 5]
    assert documents is None and targets[2].tolist() == [-1] * 7 + [1, 0, end]
    assert pixels.shape == (3, 3, 4, 4)
    assert torch.equal(pixels[0], pixels[1]) and pixels[2, 1].eq(1).all() and pixels[2, 0].eq(-1).all()


def test_a_cut_conversation_loses_the_images_of_its_end():
    turns = [Turn("user", "<image>a"), Turn("assistant", "b"), Turn("user", "c<image>"), Turn("assistant", "d")]
    turns = with_images(Conversation(tuple(turns), "row", {}), 2, 3)
    conversation = ImageConversation(turns, "row", {}, (Path("a"), Path("b")), ("x", "y"))
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)
    whole, cut = (encode_image_conversations([conversation], chat, context) for context in (16, 12))
    assert (whole.examples[0].images, whole.examples[0].tokens[12:15]) == (("a", "b"), [-6, 10, 3])
    assert cut.cut == 1 and (cut.examples[0].images, cut.examples[0].checksums) == (("a",), ("x",))
    with pytest.raises(UserError, match="row: .* have 2 <image> for 1 image:"):
        with_images(Conversation(conversation.turns, "row", {}), 1, 3)


def test_a_model_directory_names_its_parts(run):
    run(*TRAIN, "--epochs=1", "--out_dir=seen")
    content = json.loads(Path("seen/last/vision.json").read_text())
    assert content["encoder"]["n_embd"] == 16 and content["preprocessing"]["fit"] == "pad"
    assert {"vision.json", "vision.safetensors", "chat.json"} <= json.loads(
        Path("seen/last/manifest.json").read_text()
    )["files"].keys()


# ---- what reads text alone


@pytest.mark.parametrize(
    "module, flags",
    [
        (dpo, ("seen", "--train=rankings.jsonl")),
        (ppo, ("seen", "--prompts=train.jsonl", "--reward=seen")),
        (reward, ("seen", "--train=rankings.jsonl")),
        (finetune, ("seen", "--train=labels.csv", "--val_fraction=0")),
        (train, ("letters.toml", "--init_from=seen", "--device=cpu")),
        (upcycle, ("seen", "mixture")),
        (export, ("seen", "exported", "--to=hf")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_would_save_the_text_model_alone_refuses_images(module, flags, workplace, stage_runner):
    """Otherwise the run's folder would be a model that has silently lost its eyes."""
    stage_runner(sft, *TRAIN, "--epochs=1", "--out_dir=seen")
    write("rankings.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    Path("labels.csv").write_text("text,label\na,x\nb,y\n")
    Path("letters.toml").write_text('[data]\ndataset = "letters"\n')
    refused = stage_runner(module, *flags)
    mend = (
        "export all with: python tools/llava.py seen FOLDER"
        if module is export
        else "name the text model that it was made from"
    )
    assert refused.code == 2 and f" reads images, and only its text model would be saved: {mend}" in refused.message
    assert not any(Path(name).exists() for name in ("out", "mixture", "exported"))
