"""Images in requests, and attention maps, against the models themselves."""

import base64
import io

import httpx
import openai
import pytest
import torch
from PIL import Image

from gpt_arc.attention_view import MOST_TOKENS
from gpt_arc.chat.format import Turn
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.settings import Sampling
from gpt_arc.nn.attention_maps import attention_maps
from gpt_arc.serving.server import HOST, Model
from served import BYTES, CHAT, TOKEN, gpt, seeing, serving


@pytest.fixture(scope="module")
def playground():
    text = gpt(CHAT.vocab_size)
    with serving(seeing(), Model("reads", Decoder(text), BYTES, CHAT, 4, 500)) as playground:
        yield playground


@pytest.fixture
def attention(playground):
    headers = {"authorization": f"Bearer {TOKEN}"}
    address = f"http://{HOST}:{playground.port}/attention"
    with httpx.Client(headers=headers, timeout=30) as client:
        yield lambda **body: client.post(address, json=body)


def picture(colour):
    return Image.new("RGB", (12, 9), colour)


def url_of(image, kind="png"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def shown(*urls):
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def said(text):
    return {"type": "text", "text": text}


def test_answers_about_images_are_those_of_the_model(playground, client):
    """Two images and the text between them, in turns; both conversations at once, and one without images."""
    vision = playground.models["sees"].vision
    red, blue = (vision.see(picture(colour)) for colour in ("red", "blue"))
    turns = [
        Turn("user", "<image>a<image>", images=(range(-1, -5, -1), range(-5, -9, -1))),
        Turn("assistant", "b"),
        Turn("user", "<image>c", images=(range(-9, -13, -1),)),
    ]
    messages = [
        {"role": "user", "content": [*shown(url_of(picture("red"))), said("a"), *shown(url_of(picture("blue")))]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [*shown(url_of(picture("red"))), said("c")]},
    ]
    decoder = Decoder(vision.text)
    decoder.images = torch.cat((red, blue, red))
    steps = list(generate(decoder, [CHAT.prompt(turns)], 12, Sampling(temperature=0)))
    settings = {"model": "sees", "temperature": 0, "max_tokens": 12, "logprobs": True}
    answer = client.chat.completions.create(messages=messages, n=2, **settings)
    for choice in answer.choices:
        logs = [entry.logprob for entry in choice.logprobs.content]
        assert logs == pytest.approx([step.log_probabilities[0] for step in steps][: len(logs)], abs=1e-4)
    assert answer.usage.prompt_tokens == len(CHAT.prompt(turns))
    other = client.chat.completions.create(messages=[{"role": "user", "content": "<image>"}], **settings)
    assert other.choices[0].logprobs.content[0].logprob != answer.choices[0].logprobs.content[0].logprob


REFUSED = {
    "http": (shown("http://127.0.0.1/a.png"), "nothing is fetched"),
    "base64": (shown("data:image/png;base64,é"), "nothing is fetched"),
    "broken": (shown("data:image/png;base64,AAAA"), "image 1 is not a PNG, JPEG or WebP image"),
    "gif": (shown(url_of(picture("red"), "gif")), "image 1 is not a PNG"),
    "many": (shown(*[url_of(picture("red"))] * 17), "17 images, and 16 are the most"),
    "mark": ([said("<image>"), *shown(url_of(picture("red")))], "<image> stands for an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused(name, client):
    content, message = REFUSED[name]
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="sees", messages=[{"role": "user", "content": content}])


def test_models_and_roles_without_images_say_so(client):
    content = shown(url_of(picture("red")))
    with pytest.raises(openai.BadRequestError, match="reads reads text alone: leave the images out"):
        client.chat.completions.create(model="reads", messages=[{"role": "user", "content": content}])
    with pytest.raises(openai.BadRequestError, match="role system: users alone"):
        client.chat.completions.create(model="sees", messages=[{"role": "system", "content": content}])
    assert [model.images for model in client.models.list()] == [True, False]


def maps_of(answer):
    size = len(answer["tokens"])
    levels = torch.frombuffer(bytearray(base64.b64decode(answer["weights"])), dtype=torch.uint8)
    return levels.view(answer["layers"], answer["heads"], size, size) / 255


def test_attention_is_that_of_the_latest_tokens(playground, attention):
    model = playground.models["sees"]
    for text, earlier in (("abc", 0), ("ab" * 70, 140 - MOST_TOKENS)):
        answer = attention(model="sees", prompt=text).json()
        expected = attention_maps(model.decoder.model, BYTES.encode(text))[..., earlier:, earlier:]
        assert answer["tokens"] == list(text[earlier:]) and answer["earlier"] == earlier
        torch.testing.assert_close(maps_of(answer), expected, atol=0.5 / 255 + 1e-5, rtol=0)


def test_attention_in_a_conversation_with_an_image(playground, attention):
    model = playground.models["sees"]
    message = {"role": "user", "content": [*shown(url_of(picture("blue"))), said("hi")]}
    answer = attention(model="sees", messages=[message]).json()
    tokens = CHAT.prompt([Turn("user", "<image>hi", images=(range(-1, -5, -1),))])
    expected = attention_maps(model.decoder.model, tokens, model.vision.see(picture("blue")))
    assert answer["tokens"].count("[image]") == 4 and len(answer["tokens"]) == len(tokens)
    torch.testing.assert_close(maps_of(answer), expected, atol=0.5 / 255 + 1e-5, rtol=0)


def test_attention_that_can_t_be_had_is_refused(attention):
    assert "there is no model x" in attention(model="x", prompt="a").text
    assert attention(model="reads", prompt="a" * 100).status_code == 400
    assert attention(model="reads", messages=[{"role": "user", "content": shown("data:,")}]).status_code == 400
