"""The server, by the openai package and by raw HTTP, against what `generate` and the tokenizer give."""

import asyncio
import concurrent.futures
import json
import socket
import threading
import time

import httpx
import openai
import pytest
import torch

from gpt_arc.chat.format import Turn
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import UserError
from gpt_arc.serving import engine as engines
from gpt_arc.serving.server import HOST, Model, listen
from served import BYTES, CHAT, TOKEN, gpt, idle, serving

LETTERS = CharTokenizer("abcdefghijklmnop \n")


@pytest.fixture(scope="module")
def playground():
    letters, chatting = gpt(LETTERS.vocab_size), gpt(CHAT.vocab_size)
    models = [
        Model("letters", Decoder(letters), LETTERS, None, 4, 500),
        Model("out/chat", Decoder(chatting), BYTES, CHAT, 4, 100_000),
    ]
    with serving(*models) as playground:
        yield playground


@pytest.fixture
def raw(playground):
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://{HOST}:{playground.port}", headers=headers, timeout=30) as client:
        yield client


def expected(playground, name, prompt, count, sampling=Sampling(), seed=0, rows=1):  # noqa: B008  frozen
    """Returns the tokens and log-probabilities of each row, computed by themselves."""
    model = playground.models[name].decoder.model
    answers = []
    for generator in row_generators(seed, range(rows)):
        steps = list(generate(model, [prompt], count, sampling, generators=[generator]))
        answers.append(([step.tokens[0] for step in steps], [step.log_probabilities[0] for step in steps]))
    return answers


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["letters", "out/chat"]
    model = client.models.retrieve("out/chat")
    assert model.object == "model" and model.chat and model.context == 64
    with pytest.raises(openai.NotFoundError, match="there is no model gpt; the models are letters, out/chat"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_is_what_generate_gives(client, playground, temperature):
    sampling = Sampling(temperature, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    answer = client.completions.create(
        model="letters", prompt="abc", max_tokens=80, temperature=temperature, top_p=0.9, n=3, seed=5, logprobs=2,
        extra_body={"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2},
    )  # fmt: skip
    prompt = LETTERS.encode("abc")
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and answer.object == "text_completion"
    for choice, (tokens, logs) in zip(answer.choices, expected(playground, "letters", prompt, 80, sampling, 5, 3)):
        assert choice.text == LETTERS.decode(tokens) and choice.finish_reason == "length"
        assert choice.logprobs.tokens == list(choice.text) and choice.logprobs.text_offset == list(range(80))
        torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), torch.tensor(logs))
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3, "completion_tokens": 240, "total_tokens": 243,
    }  # fmt: skip
    with torch.no_grad():
        model = playground.models["letters"].decoder.model
        logs = model(torch.tensor([prompt]))[0, -1].log_softmax(-1).sort(descending=True)
    best = {LETTERS.decode([id]): log for id, log in zip(logs.indices[:2].tolist(), logs.values[:2].tolist())}
    assert answer.choices[0].logprobs.top_logprobs[0] == pytest.approx(best, abs=1e-5)


def test_a_stream_has_the_pieces_of_the_whole_answer(client):
    request = {"model": "letters", "prompt": ["ab", "c"], "max_tokens": 12, "n": 2, "seed": 3, "logprobs": 1}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for choice in whole.choices:
        parts = [part for chunk in chunks[:-1] for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [token for part in parts for token in part.logprobs.tokens] == choice.logprobs.tokens
        assert [part.finish_reason for part in parts] == [None] * 11 + ["length"]


def test_a_text_ends_before_a_stop(client):
    request = {"model": "letters", "prompt": "a", "max_tokens": 60, "seed": 1}
    text = client.completions.create(**request).choices[0].text
    for stop in (text[20:23], [text[30:32], text[20:23], "zz"]):
        stops = [stop] if isinstance(stop, str) else stop
        place = min(text.find(each) for each in stops if each in text)
        choice = client.completions.create(**request, stop=stop).choices[0]
        assert choice.text == text[:place] and choice.finish_reason == "stop"
        chunks = client.completions.create(**request, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[:place]


def test_prompts_of_tokens_and_an_empty_prompt(client):
    request = {"model": "letters", "max_tokens": 5, "temperature": 0}
    texts = [choice.text for choice in client.completions.create(**request, prompt=["ab", "c"]).choices]
    tokens = [LETTERS.encode("ab"), LETTERS.encode("c")]
    assert [choice.text for choice in client.completions.create(**request, prompt=tokens).choices] == texts
    assert client.completions.create(**request, prompt=tokens[0]).choices[0].text == texts[0]
    start = client.completions.create(**request, prompt="").choices[0].text
    assert start == client.completions.create(**request, prompt=[LETTERS.start_token]).choices[0].text


def test_without_a_seed_answers_differ(client):
    request = {"model": "letters", "prompt": "a", "max_tokens": 40}
    assert len({client.completions.create(**request).choices[0].text for _ in range(3)}) == 3


def test_a_chat_answers_as_its_template_says(client, playground):
    messages = [{"role": "system", "content": "é"}, {"role": "user", "content": [{"type": "text", "text": "<|end|>"}]}]
    answer = client.chat.completions.create(
        model="out/chat", messages=messages, max_tokens=9, seed=2, logprobs=True, top_logprobs=3
    )
    prompt = CHAT.prompt([Turn("system", "é"), Turn("user", "<|end|>")])
    ((tokens, logs),) = expected(playground, "out/chat", prompt, 9, seed=2)
    length = next((i for i, token in enumerate(tokens) if token in CHAT.ends), len(tokens))
    choice = answer.choices[0]
    assert choice.message.content == CHAT.decode(tokens) and choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if length < 9 else "length") and answer.usage.prompt_tokens == len(prompt)
    assert len(choice.logprobs.content) == min(length + 1, 9)
    torch.testing.assert_close([one.logprob for one in choice.logprobs.content], logs[: length + 1], atol=1e-5, rtol=0)
    for one, token in zip(choice.logprobs.content, tokens):
        assert len(one.top_logprobs) == 3 and one.bytes in (None, list(BYTES.decode([token]).encode()))
    stream = client.chat.completions.create(model="out/chat", messages=messages, max_tokens=9, seed=2, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant" and "".join(delta.content for delta in deltas) == choice.message.content


def test_a_chat_that_outgrows_the_context_loses_its_oldest_turns(client):
    turns = [{"role": role, "content": "x" * 8} for _ in range(9) for role in ("user", "assistant")]
    answer = client.chat.completions.create(model="out/chat", messages=turns[:-1], max_tokens=8)
    assert answer.usage.prompt_tokens <= 56
    with pytest.raises(openai.BadRequestError, match="more than the 56 that the context leaves") as refused:
        client.chat.completions.create(model="out/chat", messages=[{"role": "user", "content": "x" * 99}], max_tokens=8)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"


REFUSED = [
    ({"model": "other"}, "there is no model other; the models are letters, out/chat"),
    ({"prompt": "é"}, "é"),
    ({"prompt": "a" * 65}, "the prompt has 65 tokens, and the model's context 64"),
    ({"prompt": [99]}, "the prompt must have tokens, from 0 to 17"),
    ({"prompt": []}, "the prompt must have tokens"),
    ({"prompt": ["a"] * 100, "n": 2}, "100 prompts of n = 2 are more than 128 choices"),
    ({"prompt": 5}, "prompt"),
    ({"max_tokens": 501}, "max_tokens = 501 is more than 500, the most of this server"),
    ({"max_tokens": 0}, "max_tokens = 0"),
    ({"temperature": 3}, "temperature = 3"),
    ({"temperature": "1"}, "temperature"),
    ({"n": 1000}, "n = 1000"),
    ({"seed": -1}, "seed = -1"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"logprobs": 21}, "logprobs = 21"),
    ({"echo": True}, "this server has no echo: leave it out"),
    ({"logit_bias": {"5": 3}}, "this server has no logit_bias: leave it out"),
    ({"frequency_penalty": 1}, "this server has no frequency_penalty: leave it out"),
    ({"tempo": 1}, "unknown key tempo"),
    ({"prompt": None}, "it lacks prompt"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=lambda value: str(value)[:30])
def test_wrong_requests_are_refused_in_a_sentence(raw, change, message):
    answer = raw.post("/v1/completions", json={"model": "letters", "prompt": "a", "max_tokens": 4} | change)
    error = answer.json()["error"]
    assert answer.status_code == (404 if "model" in change else 400) and message in error["message"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == next(iter(change)) or "n" in change or "lacks" in message


def test_what_clients_send_without_meaning_it_is_accepted(client):
    answer = client.completions.create(
        model="letters", prompt="a", max_tokens=2, frequency_penalty=0, presence_penalty=0, echo=False, best_of=1,
        logit_bias={}, user="me", logprobs=None,
    )  # fmt: skip
    assert answer.choices[0].logprobs is None


BODIES = [b"{", b"[]", b"\xff", b'{"model": NaN', b"[" * 100_000, b'{"prompt": "\\ud800", "model": "letters"}']


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body[:10]))
def test_a_body_that_is_no_request_is_refused(raw, body):
    assert raw.post("/v1/completions", content=body).status_code == 400


def test_a_body_without_end_is_refused(raw):
    answer = raw.post("/v1/completions", content=(b"x" * (1 << 20) for _ in range(40)))
    assert answer.status_code == 413 and "33,554,432 bytes" in answer.json()["error"]["message"]


def test_a_model_without_conversations_says_so(client):
    with pytest.raises(openai.BadRequestError, match="letters hasn't learned conversations: use /v1/completions"):
        client.chat.completions.create(model="letters", messages=[{"role": "user", "content": "a"}])


def test_only_who_knows_the_token_is_answered(raw, playground):
    for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": b"Bearer \xe9"}):
        raw.headers.pop("authorization", None)
        for path in ("/v1/models", "/v1/nothing", "/v1/completions"):
            answer = raw.get(path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    with openai.OpenAI(base_url=f"http://{HOST}:{playground.port}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="the token is wrong or missing"):
            stranger.models.list()


@pytest.mark.parametrize("headers", [
    {"host": "evil.example"}, {"host": "127.0.0.1"}, {"host": "127.0.0.1:1"}, {"origin": "http://evil.example"},
    {"origin": "null"}, {"origin": "https://127.0.0.1:{port}"}, {"origin": "http://127.0.0.1:1"},
])  # fmt: skip
def test_pages_of_other_places_are_refused(raw, playground, headers):
    headers = {name: value.replace("{port}", str(playground.port)) for name, value in headers.items()}
    for path in ("/", "/v1/models"):
        assert raw.get(path, headers=headers).status_code == 403
    for host in (HOST, "localhost"):
        right = {"host": f"{host}:{playground.port}", "origin": f"http://{host}:{playground.port}"}
        assert raw.get("/v1/models", headers=right).status_code == 200


def test_the_page_holds_no_token_and_may_load_nothing(raw):
    del raw.headers["authorization"]
    answer = raw.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and TOKEN not in answer.text
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert "connect-src 'self'" in policy and answer.headers["x-content-type-options"] == "nosniff"


def test_the_server_listens_on_this_machine_alone(playground):
    with pytest.raises(UserError, match=f"port {playground.port} can't be used .*: name another by --port"):
        listen(playground.port)
    listening = listen(0)
    assert listening.getsockname()[0] == "127.0.0.1"
    listening.close()


def test_many_clients_at_once_get_their_own_answers(client, playground):
    """More than the rows of a batch, of different lengths and settings."""

    def ask(number):
        settings = {"max_tokens": 2 + number % 7, "temperature": number % 3 / 2, "seed": number}
        stream = number % 2 == 1
        answer = client.completions.create(model="letters", prompt="ab"[: 1 + number % 2], stream=stream, **settings)
        return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(50)))
    for number, answer in enumerate(answers):
        sampling, prompt = Sampling(number % 3 / 2), LETTERS.encode("ab"[: 1 + number % 2])
        ((tokens, _),) = expected(playground, "letters", prompt, 2 + number % 7, sampling, number)
        assert answer == LETTERS.decode(tokens)
    assert idle(playground)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_costing(playground, stream):
    body = {"model": "out/chat", "prompt": "a", "max_tokens": 100_000, "n": 2, "stream": stream}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{playground.port}\r\nAuthorization: Bearer {TOKEN}\r\n"
    engine = playground.engines["out/chat"]
    with socket.create_connection((HOST, playground.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        end = time.monotonic() + 10
        while len(engine._running) < 2 and time.monotonic() < end:
            time.sleep(0.005)
        assert len(engine._running) == 2
    assert idle(playground)


def test_clients_that_wait_may_go_away_too_and_too_many_are_refused(client, playground, monkeypatch):
    monkeypatch.setattr(engines, "MOST_WAITING", 6)
    long = {"model": "out/chat", "prompt": "a", "max_tokens": 100_000, "stream": True}
    first = client.completions.create(**long, n=4)
    next(iter(first))
    waiting = []
    thread = threading.Thread(target=lambda: waiting.append(client.completions.create(**long, n=6)))
    thread.start()
    thread.join()
    engine, end = playground.engines["out/chat"], time.monotonic() + 10
    while len(engine._waiting) < 6 and time.monotonic() < end:
        time.sleep(0.005)
    for stream in (True, False):
        with pytest.raises(openai.RateLimitError, match="too many requests wait already"):
            client.completions.create(**long | {"stream": stream})
    waiting[0].close()
    first.close()
    assert idle(playground) and client.completions.create(**long | {"stream": False, "max_tokens": 2}).choices


def test_a_model_that_fails_ends_its_answers_and_goes_on(client, playground, monkeypatch):
    decoder = playground.models["letters"].decoder
    request = {"model": "letters", "prompt": "a", "max_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "step", lambda tokens: torch.full((len(tokens), LETTERS.vocab_size), torch.nan))
        with pytest.raises(openai.InternalServerError, match="numbers that are not finite"):
            client.completions.create(**request)
        with pytest.raises(openai.APIError, match="numbers that are not finite"):
            list(client.completions.create(**request, stream=True))
    assert client.completions.create(**request).choices[0].finish_reason == "length"


def test_the_engine_reads_a_joining_prompt_between_two_steps():
    """A second request begins before the first has ended, and both go on together."""

    async def answers():
        decoder = Decoder(gpt(LETTERS.vocab_size))
        model = Model("m", decoder, LETTERS, None, 4, 500)
        sizes = []
        step = decoder.step
        decoder.step = lambda tokens: (sizes.append(len(tokens)), step(tokens))[1]
        engine = engines.Engine(decoder, 4)
        task = asyncio.create_task(engine.serve())
        first, second = (engine.run(choices_of(model, limit)) for limit in (30, 5))
        await anext(first)
        assert sum([len(pieces) async for pieces in second]) == 5
        assert not engine.idle
        others = sum([len(pieces) async for pieces in first])
        task.cancel()
        return others, sizes

    others, sizes = asyncio.run(answers())
    assert others == 29 and sizes.count(2) == 4 and sizes[-1] == 1 and len(sizes) == 29


def choices_of(model, limit):
    from gpt_arc.serving.protocol import CompletionRequest

    return model.choices(CompletionRequest(model="m", prompt="a", max_tokens=limit))[0]
