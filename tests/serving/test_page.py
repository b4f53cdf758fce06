"""The playground's page in a browser."""

import base64
import time

import pytest
from PIL import Image

from browser import chromium, watched
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.serving.server import HOST, Model
from served import BYTES, CHAT, TOKEN, gpt, idle, seeing, serving
from stub_models import counting_model

pytestmark = pytest.mark.slow
MARKUP = CharTokenizer("<b>hi ")  # which a counting model writes again and again


def markup(name, most=5000):
    return Model(name, Decoder(counting_model(MARKUP.vocab_size, 16)), MARKUP, None, 4, most)


def opened(browser, playground, token=TOKEN, **settings):
    """Returns the page of a playground, and a list of its errors and requests to other places."""
    page, events = watched(browser, **settings)
    page.goto(f"http://{HOST}:{playground.port}/#token={token}")
    return page, lambda: [event for event in events if not event.startswith(f"http://{HOST}:{playground.port}/")]


def written(page):
    return page.locator(".text").first.inner_text()


def test_a_text_streams_stops_and_survives_a_reload():
    with serving(markup("m")) as playground, chromium() as browser:
        page, problems = opened(browser, playground)
        page.locator("#go:enabled").wait_for()
        page.get_by_label("most tokens").fill("4000")
        page.get_by_label("temperature").fill("0")
        page.get_by_label("Prompt").fill("hi <b")
        page.get_by_label("Prompt").press("Control+Enter")
        page.locator(".token").nth(20).wait_for()
        assert page.locator("#stop").is_enabled() and not page.locator("#go").is_enabled()
        page.get_by_role("button", name="Stop").click()
        page.locator("#go:enabled").wait_for()
        assert idle(playground)
        text = written(page)
        assert text.startswith("hi <b>hi <b>hi <b>") and len(text) < 4000 and "stopped" in page.inner_text("#outputs")
        assert page.locator("#outputs b").count() == 0  # it is shown as text
        page.locator(".token").nth(2).hover()
        assert page.locator("#tip .drawn").inner_text().split()[0] == '"i"'
        assert page.locator("#tip div").count() == MARKUP.vocab_size
        page.reload()
        page.locator("#go:enabled").wait_for()
        assert page.get_by_label("Prompt").input_value() == "hi <b"
        assert page.get_by_label("most tokens").input_value() == "4000" and written(page) == ""
        assert problems() == []


def test_a_page_that_is_closed_stops_costing():
    with serving(markup("m", 1_000_000)) as playground, chromium() as browser:
        page, _ = opened(browser, playground)
        page.locator("#go:enabled").wait_for()
        page.evaluate("limit.max = models[0].max_tokens")
        page.get_by_label("most tokens").fill("1000000")
        page.get_by_role("button", name="Generate").click()
        page.locator(".token").first.wait_for()
        assert not playground.engines["m"].idle
        page.close()
        assert idle(playground)


def test_two_models_on_a_narrow_screen_one_of_which_chats():
    name = "<img src=x onerror=alert(1)>"
    chat = Model("chat", Decoder(gpt(CHAT.vocab_size)), BYTES, CHAT, 4, 500)
    with serving(markup(name), chat) as playground, chromium() as browser:
        settings = {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark", "has_touch": True}
        page, problems = opened(browser, playground, **settings)
        page.locator("#settings summary").click()
        page.get_by_label("most tokens").fill("20")
        page.get_by_label("seed").fill("1")
        page.get_by_label("Prompt").fill("<b>hi")
        page.get_by_role("button", name="Generate").click()
        page.locator("#go:enabled").wait_for()
        assert page.locator("h2").all_inner_texts() == [name, "chat"]
        assert page.locator(".text").nth(1).inner_text().startswith("<b>hi")
        page.locator(".token").first.tap()
        assert page.locator("#tip").is_visible()
        page.get_by_label("chat", exact=True).check()
        for turn in ("<b>one</b>", "two"):
            page.get_by_label("Your turn").fill(turn)
            page.get_by_role("button", name="Send").click()
            page.locator("#go:enabled").wait_for()
        assert page.locator(".turn.user").all_inner_texts() == ["<b>one</b>", "two"]
        assert page.locator(".turn.assistant").count() == 2 and "hasn't learned" in page.inner_text("#outputs")
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
        assert problems() == []


def test_a_wrong_token_and_a_refusal_are_said():
    with serving(markup("m")) as playground, chromium() as browser:
        page, _ = opened(browser, playground, token="wrong")
        page.locator("#error:visible").wait_for()
        assert "open the address that the server printed" in page.inner_text("#error")
        page, _ = opened(browser, playground)
        page.locator("#go:enabled").wait_for()
        page.get_by_label("Prompt").fill("é")
        page.get_by_role("button", name="Generate").click()
        page.locator("#error:visible").wait_for()
        assert "é" in page.inner_text("#error") and page.locator("#go").is_enabled()


def test_attention_is_drawn_by_layer_and_head_and_read_by_token():
    with serving(markup("m")) as playground, chromium() as browser:
        page, problems = opened(browser, playground, viewport={"width": 390, "height": 800}, has_touch=True)
        page.locator("#go:enabled").wait_for()
        page.get_by_label("Prompt").fill("hi <b>")
        page.get_by_role("button", name="Attention").click()
        page.get_by_role("button", name="layer 1, head 1").wait_for()
        data = page.evaluate("call('attention', {model: 'm', prompt: 'hi <b>'}).then(answer => answer.json())")
        levels, size = base64.b64decode(data["weights"]), len("hi <b>")
        assert page.locator(".attention .all button").count() == data["layers"] * data["heads"]
        row = levels[size * (size - 1) : size * size]  # of the last token, in the first head
        assert f'Token 6, ">", attends to {most(row, "hi <b>")}' in page.locator(".seen").inner_text()
        pixels = "[...document.querySelector('.one canvas').getContext('2d').getImageData(0, 0, 6, 6).data]"
        opaque = [value > 0 for value in page.evaluate(pixels)[3::4]]
        assert opaque == [key <= query for query in range(size) for key in range(size)]  # the causal triangle
        page.get_by_label("token that attends").fill("0")
        assert 'Token 1, "h", attends to "h" (1) 100.0%' in page.locator(".seen").inner_text()
        page.locator(".attention .all button").last.click()
        assert (
            page.locator("[aria-pressed=true]").get_attribute("aria-label")
            == f"layer {data['layers']}, head {data['heads']}"
        )
        assert page.locator(".words b").count() == 0 and page.locator(".words").inner_text() == "hi <b>"
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
        assert problems() == []


def most(levels, text):
    """What the page says of a token's attention, from its levels."""
    places = sorted(range(len(text)), key=lambda place: -levels[place])[:5]
    return ", ".join(f'"{text[i]}" ({i + 1}) {levels[i] / 2.55:.1f}%' for i in places if levels[i])


def test_an_image_is_shown_to_the_models_that_see(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    chat = Model("reads", Decoder(gpt(CHAT.vocab_size)), BYTES, CHAT, 4, 500)
    with serving(chat, seeing()) as playground, chromium() as browser:
        page, problems = opened(browser, playground)
        page.locator("#go:enabled").wait_for()
        assert page.get_by_label("images").is_hidden()
        page.get_by_label("chat", exact=True).check()
        page.get_by_label("most tokens").fill("5")
        for files, turn in (([tmp_path / "red.png"], "what"), ([], "and")):
            page.get_by_label("images").set_input_files(files)
            page.get_by_label("Your turn").fill(turn)
            page.get_by_role("button", name="Send").click()
            page.locator("#go:enabled").wait_for()
        assert page.get_by_alt_text("red.png").count() == 1 and page.locator(".turn.user").count() == 3
        assert "can't see images" not in page.inner_text("#outputs")  # the second turn has none
        page.get_by_role("button", name="Attention").nth(1).click()
        page.locator(".attention").wait_for()
        assert page.locator(".words").inner_text().count("[image]") == 4
        (tmp_path / "red.png").write_text("no image")
        page.get_by_label("images").set_input_files(tmp_path / "red.png")
        page.get_by_label("Your turn").fill("look")
        page.get_by_role("button", name="Send").click()
        page.locator("#error:visible").wait_for()
        assert "image 2 is not a PNG, JPEG or WebP image" in page.inner_text("#error")
        page.locator("#go:enabled").wait_for()
        assert page.get_by_label("Your turn").input_value() == "look"
        page.get_by_role("button", name="Send").click()
        page.locator("#go:enabled").wait_for()
        assert page.locator(".turn.user").nth(-1).inner_text() == "look" and page.locator("#error").is_hidden()
        assert problems_of_requests(problems()) == []


def problems_of_requests(events):
    """The events except the refusal, which the console notes, and the images in the page."""
    return [event for event in events if "status of 400" not in event and not event.startswith("data:image/")]


def test_the_streamed_tokens_appear_before_the_last_is_drawn():
    model = markup("m")
    step = model.decoder.step
    model.decoder.step = lambda tokens: (time.sleep(0.05), step(tokens))[1]
    with serving(model) as playground, chromium() as browser:
        page, _ = opened(browser, playground)
        page.get_by_label("most tokens").fill("60")
        page.get_by_role("button", name="Generate").click()
        page.locator(".token").nth(4).wait_for()
        assert page.locator(".token").count() < 50
        page.locator("#go:enabled").wait_for()
        assert page.locator(".token").count() == 60
