"""Continuations that join and leave a running batch, against the same ones computed alone."""

import dataclasses
import random

import pytest
import torch

from gpt_arc.decoding.batch import LiveBatch, LiveRequest
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import NotFinite
from helpers import randomised
from model import GPT, GPTConfig

TINY = GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=4, n_embd=32)
SAMPLINGS = [Sampling(temperature=0), Sampling(), Sampling(top_k=3), Sampling(0.7, repetition_penalty=1.5)]


def tokens_of(length: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(TINY.vocab_size) for _ in range(length)]


def request_of(seed: int, sampling: Sampling = SAMPLINGS[1], alternatives: int = 0, length: int = 3) -> LiveRequest:
    return LiveRequest(tokens_of(length, seed), sampling, row_generators(seed, [0])[0], alternatives)


def alone(model: GPT, seed: int, sampling: Sampling, length: int, count: int) -> list[tuple[int, float]]:
    steps = generate(model, [tokens_of(length, seed)], count, sampling, generators=row_generators(seed, [0]))
    return [(step.tokens[0], step.log_probabilities[0]) for step in steps]


DYNAMIC = {"positions": "rotary", "rotary_scaling": "dynamic", "rotary_factor": 2.0, "rotary_context": 6}
VARIANTS = [{}, {"positions": "rotary", "attention_band": 5}, {"ngrams": 3, "ngram_rows": 50}, DYNAMIC]


@pytest.mark.parametrize("change", VARIANTS)
def test_continuations_that_come_and_go_are_those_computed_alone(change):
    """Lengths above the context too, where the oldest quarter is dropped."""
    model = randomised(GPT(dataclasses.replace(TINY, **change)))
    draws, batch = random.Random(1), LiveBatch(Decoder(model), 4)
    waiting = [(seed, SAMPLINGS[seed % 4], draws.randint(1, 14), draws.randint(1, 20)) for seed in range(14)]
    expected = {seed: alone(model, seed, sampling, length, count) for seed, sampling, length, count in waiting}
    answers, requested, leaving = {}, {}, []
    while waiting or batch.requests[len(leaving) :]:
        joining = {}
        while waiting and len(batch.requests) - len(leaving) + len(joining) < 5 and draws.random() < 0.6:
            seed, sampling, length, count = waiting.pop()
            joining[request_of(seed, sampling, length=length)] = seed, count
        requested |= joining
        produced = batch.step(list(joining), leaving)
        leaving = []
        for request, token in produced:
            seed, count = requested[request]
            answers.setdefault(seed, []).append((token.id, token.log_probability))
            if len(answers[seed]) == count:
                leaving.append(request)
    assert answers.keys() == expected.keys()
    for seed, answer in answers.items():
        assert [id for id, _ in answer] == [id for id, _ in expected[seed]]
        torch.testing.assert_close([log for _, log in answer], [log for _, log in expected[seed]], atol=1e-5, rtol=1e-5)


def test_equal_prompts_are_read_once_and_draw_apart():
    model = randomised(GPT(TINY))
    decoder, read = Decoder(model), []
    encode = decoder._encode
    decoder._encode = lambda rows: (read.append(len(rows)), encode(rows))[1]
    batch, prompt = LiveBatch(decoder), tokens_of(5, 1)
    requests = [LiveRequest(prompt, Sampling(), generator) for generator in row_generators(3, range(4))]
    first = batch.step([request_of(9), *requests[:3]])
    second = batch.step([requests[3]])
    assert read == [2, 1] and len(first) == 4 and len(second) == 5
    whole = list(generate(model, [prompt] * 4, 2, Sampling(), generators=row_generators(3, range(4))))
    assert [token.id for _, token in first[1:]] == whole[0].tokens[:3]
    assert [token.id for _, token in second[1:4]] == whole[1].tokens[:3]
    assert second[4][1].id == whole[0].tokens[3]


def test_alternatives_are_the_most_likely_tokens():
    model = randomised(GPT(TINY))
    few, many, none = request_of(1, alternatives=3), request_of(2, alternatives=99), request_of(3)
    for request, token in LiveBatch(Decoder(model)).step([few, many, none]):
        with torch.no_grad():
            logs = model(torch.tensor([request.prompt]))[0, -1].log_softmax(-1)
        count = {few: 3, many: TINY.vocab_size, none: 0}[request]
        assert [id for id, _ in token.alternatives] == logs.argsort(descending=True)[:count].tolist()
        best = logs.sort(descending=True).values[:count]
        torch.testing.assert_close(torch.tensor([log for _, log in token.alternatives]), best)


def test_an_empty_batch_does_nothing_and_can_be_joined_again():
    batch = LiveBatch(Decoder(randomised(GPT(TINY))), 2)
    assert batch.step() == []
    request = request_of(1)
    assert len(batch.step([request])) == 1
    assert batch.step(leaving=[request]) == [] and not batch.decoder.sequences
    assert len(batch.step([request_of(2), request_of(3)])) == 2


def test_a_model_with_damaged_weights_is_said():
    model = randomised(GPT(TINY))
    with torch.no_grad():
        model.token_embedding.weight.fill_(torch.nan)
    with pytest.raises(NotFinite):
        LiveBatch(Decoder(model)).step([request_of(1)])
