"""stages/pretrain_encoder.py: learning labels, the format of transformers, processes, resuming, refusals."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.nn.names import ContrastiveLoss
from gpt_arc.training.log import read_metrics
from gpt_arc.vision.contrastive import LOSSES, CaptionedImages, CaptionMatcher, CaptionReader
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.images import Preprocessing
from gpt_arc.vision.labels import ImageClassifier, class_numbers, classes_of, read_labelled_images
from gpt_arc.vision.model import load_vision
from gpt_arc.vision.pretrained import read_encoder, write_encoder
from gpt_arc.weights.directory import load_text_model, save_model
from helpers import assert_same_weights, command, interrupt_at, randomised, write
from model import GPT, GPTConfig
from stages import pretrain_encoder, sft

COLOURS = {"red": "warm", "yellow": "warm", "blue": "cold", "cyan": "cold", "black": None}
LETTERS = " abcdeklmnoruwy"  # of the labels
NEW = "image_size = 8\npatch_size = 4\nn_layer = 1\nn_head = 2\nn_embd = 16\n"
QUICK = ("--device=cpu", "--dtype=float32", "--batch_size=4", "--epochs=2", "--val_fraction=0", "--learning_rate=1e-2")
TRAIN = ("--image_encoder=new.toml", "--train=train.jsonl", "--labels", "colour", "warmth", *QUICK)


def rows(times=1):
    return [{"image": f"{name}.png", "colour": name, "warmth": warmth} for name, warmth in COLOURS.items()] * times


@pytest.fixture
def run(tmp_path, monkeypatch, stage_runner):
    monkeypatch.chdir(tmp_path)
    for name in COLOURS:
        Image.new("RGB", (8, 8), name).save(f"{name}.png")
    write("train.jsonl", rows(3))
    Path("new.toml").write_text(NEW)
    return partial(stage_runner, pretrain_encoder)


def losses(folder):
    return [line["train_loss"] for line in read_metrics(Path(folder) / "metrics.jsonl")]


def test_it_learns_labels_and_the_encoder_goes_to_a_text_model(run, stage_runner):
    write("train.jsonl", rows(20))
    output = run(*TRAIN, "--val=train.jsonl", "--epochs=3", "--out_dir=encoder")
    assert "colour: black, blue, cyan, red, yellow\n" in output and "100 images with 180 labels" in output
    assert read_metrics(Path("encoder/metrics.jsonl"))[-1]["val_accuracy"] == 1.0
    save_model(GPT(GPTConfig(16, 8, 1, 2, 16)), CharTokenizer("abcdefgh"), "base")
    write("chats.jsonl", [{"image": "red.png", "prompt": "a", "response": "b"}])
    flags = ("--image_encoder=encoder", "--encoder_rate=0", "--device=cpu", "--dtype=float32", "--val_fraction=0")
    assert "finished" in stage_runner(sft, "base", "--train=chats.jsonl", *flags, "--epochs=1", "--out_dir=seen")
    model = load_vision(Path("seen/last"), load_text_model("seen/last")[0])
    pretrained, preprocessing = read_encoder(Path("encoder/best"))
    assert model.preprocessing == preprocessing == Preprocessing()
    assert all(map(torch.equal, model.encoder.state_dict().values(), pretrained.state_dict().values()))


@torch.no_grad()
@pytest.mark.parametrize("settings, name", [
    ({}, "SiglipVisionModel"),
    ({"class_token": True}, "ViTModel"),
    ({"class_token": True, "patch_bias": False, "first_norm": True, "final_norm": False}, "CLIPVisionModel"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_what_is_written_transformers_reads(settings, name, fit, tmp_path):
    import transformers

    sizes = EncoderConfig(9, 3, 2, 3, 24, mlp_size=20, activation="gelu_tanh", norm_eps=1e-3, **settings)
    encoder, preprocessing = randomised(ImageEncoder(sizes)), Preprocessing(fit, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    write_encoder(encoder, preprocessing, tmp_path)
    pixels = torch.randn(2, 3, 9, 9)
    theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == [name]
    torch.testing.assert_close(encoder(pixels), theirs(pixels).last_hidden_state, atol=1e-5, rtol=1e-4)
    again, same = read_encoder(tmp_path)
    assert same == preprocessing and torch.equal(again(pixels), encoder(pixels))


@torch.no_grad()
@pytest.mark.parametrize("class_token", [False, True])
def test_the_loss_is_the_sum_over_the_labels_that_there_are(class_token, run):
    images = read_labelled_images(Path("train.jsonl"), ("colour", "warmth"))[:5]
    classes = classes_of(images, ("colour", "warmth"))
    assert classes == [["black", "blue", "cyan", "red", "yellow"], ["cold", "warm"]]
    labels = class_numbers(images, classes)
    assert labels.tolist() == [[3, 1], [4, 1], [1, 0], [2, 0], [0, -1]]
    encoder = ImageEncoder(EncoderConfig(8, 4, 1, 2, 16, class_token=class_token))
    model, pixels = randomised(ImageClassifier(encoder, (5, 2))), torch.randn(5, 3, 8, 8)
    features = model.encoder(pixels)
    pooled = features[:, 0] if class_token else features.mean(1)
    colour, warmth = (F.linear(pooled, head.weight, head.bias) for head in model.heads)
    loss = F.cross_entropy(colour, labels[:, 0], reduction="sum")
    loss += F.cross_entropy(warmth[:4], labels[:4, 1], reduction="sum")
    right = (colour.argmax(1) == labels[:, 0]).sum() + (warmth[:4].argmax(1) == labels[:4, 1]).sum()
    total, count = model(pixels, labels)
    torch.testing.assert_close(total, loss)
    assert count == right


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_contrastive_losses_equal_those_of_transformers(name, monkeypatch):
    import transformers

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = dict(**sizes, vocab_size=9, max_position_embeddings=6, projection_size=8, eos_token_id=8)
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=dict(**sizes, image_size=8, patch_size=4), projection_dim=8
    )
    theirs = randomised(getattr(transformers, f"{name}Model")(config), scale=0.7)
    tokens, pixels = torch.randint(8, (5, 6)), torch.randn(5, 3, 8, 8)
    expected = theirs(input_ids=tokens, pixel_values=pixels, return_loss=True)
    loss: ContrastiveLoss = "clip" if name == "CLIP" else "siglip"
    reader = CaptionReader(GPT(GPTConfig(6, 9, 1, 2, 8)), 8, loss, 5)
    for projection in (reader.image_projection, reader.text_projection):
        torch.nn.init.eye_(projection.weight)
    reader.log_scale.fill_(theirs.logit_scale.item())
    reader.bias.fill_(theirs.logit_bias.item() if loss == "siglip" else 0.0)
    monkeypatch.setattr(reader.text, "hidden", lambda tokens, lengths: expected.text_embeds[:, None])
    similarities = reader(expected.image_embeds, tokens, torch.ones(5, dtype=torch.int64), torch.arange(5))
    torch.testing.assert_close(similarities[0], expected.logits_per_image)
    torch.testing.assert_close(LOSSES[loss](*similarities) / 5, expected.loss)


@torch.no_grad()
def test_a_caption_is_its_last_token_whatever_it_is_padded_to(run):
    encoder, text = (
        randomised(ImageEncoder(EncoderConfig(8, 4, 1, 2, 16))),
        randomised(GPT(GPTConfig(16, len(LETTERS), 1, 2, 8))),
    )
    model = CaptionMatcher(encoder, text, "siglip", 5)
    images = read_labelled_images(Path("train.jsonl"), ["colour", "warmth"])[:5]
    split = CaptionedImages(images, CharTokenizer(LETTERS), 6)
    pixels, tokens, lengths, numbers = split.batch(range(5), Preprocessing(), 8)
    assert lengths.tolist() == [6, 6, 6, 6, 5]  # red warm and so on are cut; black has no warmth
    total, _ = model(pixels, tokens, lengths, numbers)
    last = torch.stack([text.hidden(row[None, :length])[0, -1] for row, length in zip(tokens, lengths)])
    left, right = model.heads.image_projection(encoder(pixels).mean(1)), model.heads.text_projection(last)
    similarities = 10 * F.cosine_similarity(left[:, None], right[None], dim=-1) - 10
    torch.testing.assert_close(total, F.binary_cross_entropy_with_logits(similarities, torch.eye(5), reduction="sum"))


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_it_learns_captions(loss, run):
    save_model(GPT(GPTConfig(16, len(LETTERS), 1, 2, 16)), CharTokenizer(LETTERS), "text")
    write("train.jsonl", rows(20))
    flags = ("--text_model=text", f"--contrastive_loss={loss}", "--val=val.jsonl", "--batch_size=5", "--epochs=4")
    write("val.jsonl", rows())
    assert "100 images with captions" in run(*TRAIN, *flags, "--out_dir=encoder")
    assert read_metrics(Path("encoder/metrics.jsonl"))[-1]["val_accuracy"] == 1.0
    assert isinstance(read_encoder(Path("encoder/best"))[0], ImageEncoder)


def test_parts_and_processes_change_only_rounding(run):
    flags = (*TRAIN, "--learning_rate=1e-3", "--adam_eps=1e-4")
    run(*flags, "--out_dir=whole")
    run(*flags, "--batch_size=1", "--gradient_accumulation_steps=4", "--out_dir=parts")
    several = ("--batch_size=1", "--gradient_accumulation_steps=4", "--backend=gloo", "--out_dir=two")
    result = command("stages/pretrain_encoder.py", *flags, *several, processes=2)
    assert result.returncode == 0, result.stderr
    for name in ("parts", "two"):
        assert losses(name) == pytest.approx(losses("whole"), rel=1e-4)
        assert_same_weights("whole/last", f"{name}/last", rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # 20 s: processes
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_captions_are_told_apart_among_those_of_all_processes(loss, run):
    """Of 11 images in updates of 10, one is left: a process repeats it. Of 9, two processes read 5 and 4."""
    save_model(GPT(GPTConfig(16, len(LETTERS), 1, 2, 16)), CharTokenizer(LETTERS), "text")
    write("train.jsonl", rows(3)[:11])
    write("val.jsonl", rows(2)[:9])
    flags = (*TRAIN, "--text_model=text", f"--contrastive_loss={loss}", "--learning_rate=1e-3", "--adam_eps=1e-4")
    flags = (*flags, "--val=val.jsonl")
    run(*flags, "--batch_size=10", "--out_dir=whole")
    several = ("--batch_size=5", "--gradient_accumulation_steps=2", "--backend=gloo", "--out_dir=two")
    result = command("stages/pretrain_encoder.py", *flags, *several, processes=2)
    assert result.returncode == 0, result.stderr
    assert losses("two") == pytest.approx(losses("whole"), rel=1e-4)
    whole, two = (read_metrics(Path(name) / "metrics.jsonl")[-1] for name in ("whole", "two"))
    assert two["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)
    assert two["val_accuracy"] == whole["val_accuracy"]
    assert_same_weights("whole/last", "two/last", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [(), ("--text_model=text", "--contrastive_loss=siglip")], ids=["labels", "captions"])
def test_an_interrupted_run_resumes_exactly(flags, run, monkeypatch):
    save_model(GPT(GPTConfig(16, len(LETTERS), 1, 2, 16)), CharTokenizer(LETTERS), "text")
    run(*TRAIN, *flags, "--out_dir=whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        assert run(*TRAIN, *flags, "--out_dir=halves").code == 130
    run("--resume=halves")
    assert losses("whole") == losses("halves")
    assert_same_weights("whole/last", "halves/last")
    run("whole", *TRAIN[1:], *flags, "--out_dir=further")
    assert losses("further")[0] < losses("whole")[0]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "none.png"}, "none.png is missing"),
        ({"image": "new.toml"}, "new.toml is not a PNG, JPEG or WebP image"),
        ({"image": "../red.png"}, "outside the folder"),
        ({"image": "https://x.org/a.png"}, "is a URL"),
        ({"image": None}, "the image 'None' is not the name of a file"),
        ({"colour": None, "warmth": ""}, "the image has no label in colour, warmth"),
        ({"colour": ["red"]}, "colour = ['red'] is not a class"),
        ({"colour": 0.5}, "colour = 0.5 is not a class"),
    ],
    ids=str,
)
def test_bad_rows_are_named_in_a_sentence(row, message, run):
    write("train.jsonl", [*rows()[:1], rows()[1] | row])
    refused = run(*TRAIN)
    assert refused.code == 2 and message in refused.message and "train.jsonl, line 2: " in refused.message
    assert refused.message.count("\n") == 1 and not Path("out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (TRAIN[1:], "name a model to start from: "),
        (("red.png", *TRAIN), "name one of them"),
        (("nowhere", *TRAIN[1:]), "model = nowhere is neither a .toml file nor a folder"),
        ((*TRAIN, "--labels", "colour", "colour"), "labels = colour, colour: name one or more columns, each once"),
        ((*TRAIN, "--labels", "size"), "there is no column size; the columns are: image, colour, warmth"),
        ((*TRAIN, "--labels", "only"), "the labels in only are all a: there must be two classes"),
        (
            (*TRAIN, "--contrastive_loss=siglip"),
            "contrastive_loss = siglip is for captions: name the text_model that reads them",
        ),
        ((*TRAIN, "--text_model=text", "--batch_size=1"), "batch_size = 1 leaves no other captions"),
        ((*TRAIN, "--text_model=text"), "red.png: the character 'r' (U+0072) at position 0"),
        ((*TRAIN, "--text_model=nowhere"), "nowhere"),
        ((*TRAIN, "--image_encoder=odd.toml"), "odd.toml: no encoder of transformers"),
        ((*TRAIN[:1], *TRAIN[2:]), "name the examples to learn from by --train"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(flags, message, run):
    Path("odd.toml").write_text(NEW + "final_norm = false\n")
    save_model(GPT(GPTConfig(16, 3, 1, 2, 16)), CharTokenizer("abc"), "text")
    if "only" in flags:
        write("train.jsonl", [row | {"only": "a"} for row in rows()])
    refused = run(*flags)
    assert refused.code == 2 and message in refused.message
