"""Decoding with images: the cache, dialogues, and sample.py as a user runs it."""

import io
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.decoding.batch import LiveBatch, LiveRequest
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.images import Images
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import UserError
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.images import read_image
from gpt_arc.vision.model import VisionGPT, save_vision
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import save_model
from helpers import randomised
from model import GPT, GPTConfig

LETTERS = CharTokenizer("abcdefgh")
GREEDY = Sampling(temperature=0)
MODERN = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, n_kv_head=1)


def vision_gpt(context=40, vocab_size=12, prefix_attention=False, **settings):
    text = GPT(GPTConfig(context, vocab_size, 2, 2, 16, **settings))
    encoder = ImageEncoder(EncoderConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=8))
    projector = Projector(ProjectorConfig(), 8, 16)
    model = VisionGPT(text, encoder, projector, prefix_attention=prefix_attention)
    return randomised(model, seed=42, scale=0.6)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (16, 8), colour).save(f"{name}.png")


def greedy(model, tokens, pixels, count):
    """Continues tokens by full forward passes."""
    for _ in range(count):
        tokens = [*tokens, model(torch.tensor([tokens]), pixels=pixels)[0, -1].argmax().item()]
    return tokens[-count:]


@torch.no_grad()
@pytest.mark.parametrize("prefill", [None, 3])
@pytest.mark.parametrize("settings", [{}, MODERN, {"attention_band": 3}, {**MODERN, "prefix_attention": True}], ids=str)
def test_cached_decoding_equals_the_full_forward(settings, prefill, pictures):
    model = vision_gpt(**settings)
    decoder = Decoder(model.text, prefill=prefill)
    images = Images(model, decoder)
    for name in ("red", "blue"):
        images.show(Path(f"{name}.png"))
    red, blue = images.take()
    assert images.take() == () and (list(red), list(blue)) == ([-1, -2, -3, -4], [-5, -6, -7, -8])
    prompts = [[1, *red, 2, *blue, 3], [4, 5], [1, *red], [1, *blue]]
    produced = [[] for _ in prompts]
    for step in generate(decoder, prompts, 6, GREEDY):
        for row, token in zip(step.rows, step.tokens):
            produced[row].append(token)
    pixels = torch.stack([model.preprocessing.pixels(read_image(Path(f"{n}.png")), 8) for n in ("red", "blue")])
    assert produced[0] == greedy(model, prompts[0], pixels, 6)
    assert produced[1] == greedy(model, prompts[1], None, 6)
    assert produced[2] == greedy(model, prompts[2], pixels[:1], 6)
    assert produced[3] == greedy(model, [1, -1, -2, -3, -4], pixels[1:], 6)
    expected = model(torch.tensor([prompts[0]]), pixels=pixels)[:, -1]
    torch.testing.assert_close(decoder.read([prompts[0]]), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prefix_attention", [False, True])
def test_a_context_that_slides_keeps_what_is_left_of_an_image(prefix_attention, pictures):
    model = vision_gpt(context=12, prefix_attention=prefix_attention)
    decoder = Decoder(model.text)
    images = Images(model, decoder)
    images.show(Path("red.png"))
    (ids,) = images.take()
    decoder.read([[1, 2, 3, *ids, 4, 5, 6, 7, 8]])
    logits = decoder.step([9])
    tokens = torch.tensor([[*ids, 4, 5, 6, 7, 8, 9]])
    torch.testing.assert_close(logits, model.text(tokens, images=decoder.images)[:, -1], atol=1e-5, rtol=1e-5)


def test_a_repetition_penalty_leaves_images_out(pictures):
    model = vision_gpt()
    decoder = Decoder(model.text)
    images = Images(model, decoder)
    images.show(Path("red.png"))
    (ids,) = images.take()
    plain = [step.log_probabilities for step in generate(decoder, [[1, *ids]], 1, GREEDY)]
    sampling = Sampling(temperature=0, repetition_penalty=50.0)
    logits = decoder.read([[1, *ids]])[0]
    (step,) = generate(decoder, [[1, *ids]], 1, sampling)
    penalised = logits.clone()
    penalised[1] = penalised[1] / 50 if penalised[1] > 0 else penalised[1] * 50
    assert step.tokens == [penalised.argmax().item()] and len(plain) == 1


@torch.no_grad()
@pytest.mark.parametrize("prefix_attention", [False, True])
def test_continuations_with_images_that_come_and_go_are_those_computed_alone(prefix_attention):
    """In a context of 14 tokens, so that the beginnings of texts and images are dropped."""
    model = vision_gpt(context=14, prefix_attention=prefix_attention)
    draws, generator = random.Random(3), torch.Generator().manual_seed(3)
    tables = [None, *(torch.randn(4 * count, 16, generator=generator) for count in (1, 2, 1))]
    expected, waiting, answers, leaving = {}, [], {}, []
    for number in range(12):
        images = tables[number % len(tables)]
        ids = [] if images is None else list(range(-1, -1 - len(images), -1))
        request = LiveRequest([1, *ids, number % 8], GREEDY, torch.Generator(), images=images)
        decoder = Decoder(model.text)
        decoder.images = images
        steps = generate(decoder, [request.prompt], draws.randint(2, 12), GREEDY)
        expected[request] = [step.tokens[0] for step in steps]
        waiting.append(request)
    batch = LiveBatch(Decoder(model.text), 3)
    while waiting or len(batch.requests) > len(leaving):
        joining = []
        while waiting and len(batch.requests) - len(leaving) + len(joining) < 4 and draws.random() < 0.6:
            joining.append(waiting.pop())
        produced, leaving = batch.step(joining, leaving), []
        for request, token in produced:
            answers.setdefault(request, []).append(token.id)
            if len(answers[request]) == len(expected[request]):
                leaving.append(request)
    assert answers == expected
    batch.step([LiveRequest([1], GREEDY, torch.Generator())], leaving)
    assert batch.decoder.images is None  # those of requests that have left aren't kept


# ---- sample.py


@pytest.fixture
def model(pictures):
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)
    model = vision_gpt(vocab_size=chat.vocab_size)
    save_model(model.text, LETTERS, "seen")
    chat.save("seen")
    save_vision(model, Path("seen"))
    save_model(model.text, LETTERS, "text")
    chat.save("text")
    return model, chat


def run(monkeypatch, capsys, *flags, typed=""):
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags, "--device=cpu", "--temperature=0", "--max_new_tokens=5"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    sample.main()
    return capsys.readouterr()


def answer(model, chat, turns, names):
    pixels = torch.stack([model.preprocessing.pixels(read_image(Path(f"{name}.png")), 8) for name in names])
    with torch.no_grad():
        return chat.decode(greedy(model, chat.prompt(turns), pixels, 5))


def test_a_question_about_an_image(model, monkeypatch, capsys):
    answers = []
    for name in ("red", "blue"):
        output = run(monkeypatch, capsys, "seen", f"--image={name}.png", "--start=abc").out
        turn = Turn("user", "<image>abc", images=(range(-1, -5, -1),))
        assert output.strip() == answer(*model, [turn], [name])
        answers.append(output)
    assert answers[0] != answers[1]
    both = run(monkeypatch, capsys, "seen", "--image", "red.png", "blue.png", "--start=abc").out
    turn = Turn("user", "<image><image>abc", images=(range(-1, -5, -1), range(-5, -9, -1)))
    assert both.strip() == answer(*model, [turn], ["red", "blue"])


def test_images_in_a_chat(model, monkeypatch, capsys):
    typed = "/image red.png\nabc\n/image none.png\n/image blue.png\nd\n"
    result = run(monkeypatch, capsys, "--chat", "seen", typed=typed)
    turns = [Turn("user", "<image>abc", images=(range(-1, -5, -1),))]
    first = answer(*model, turns, ["red"])
    turns += [Turn("assistant", first), Turn("user", "<image>d", images=(range(-5, -9, -1),))]
    second = answer(*model, turns, ["red", "blue"])
    assert result.out.split() == [first, second]
    assert "none.png is missing" in result.err
    assert "text reads text alone" in run(monkeypatch, capsys, "--chat", "text", typed="/image red.png\n").err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("text", "--image=red.png", "--start=a"), "text reads text alone: train it on images"),
        (("seen", "--image=none.png", "--start=a"), "none.png is missing"),
        (("seen", "--image=red.png"), "ask it by --start"),
        (("seen", "--image=red.png", "--start=a", "--num_samples=2"), "leave num_samples out"),
        (("seen", "--image=red.png", "--start=a", "--num_beams=2"), "leave num_beams out"),
        (("seen", "--image=red.png", "--start=a", "--draft=text"), "leave draft out"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(flags, message, model, monkeypatch, capsys):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, capsys, *flags)
