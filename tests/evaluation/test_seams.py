"""Texts whose tokens span the end of a context: scored as whole texts, and like the harness everywhere else."""

import random
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.model import TemplateLM

from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.evaluation.reader import Reader
from gpt_arc.evaluation.score import encode_pairs
from helpers import randomised
from model import GPT, GPTConfig

PROSE = "They hope for world peace. They hope for work. Answer: the Answer is a word, a world, a worm. " * 3
TOKENIZER = BPETokenizer.train([PROSE], 330)
SHAPE = dict(block_size=64, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def reader():
    return Reader(randomised(GPT(GPTConfig(**SHAPE))), TOKENIZER, 1000)


@torch.no_grad()
def whole_log(model, tokens):
    """The log-probability in nats of the tokens of a text after the first."""
    logs = model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)
    return logs[torch.arange(len(tokens) - 1), tokens[1:]].sum().item()


def harness_pair(tokenizer, context, continuation):
    """The harness's own split of a pair."""
    adapter = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    return TemplateLM._encode_pair(adapter, context, continuation)


def differences(model, context, options):
    """For each option, log P(context + option) - log P(context + first option), from the tokens of whole texts."""
    texts, alone = [TOKENIZER.encode(context + option) for option in options], TOKENIZER.encode(context)
    if any(text[:1] != alone[:1] for text in texts):  # the first token may differ: begin before it
        texts = [[TOKENIZER.start_token, *text] for text in texts]
    logs = [whole_log(model, text) for text in texts]
    return [log - logs[0] for log in logs]


def test_the_text_that_is_asked_for_is_scored(reader):
    context, options = "They hope for wor", ["ld peace", "k peace"]
    assert [harness_pair(TOKENIZER, context, option)[1] for option in options] == [TOKENIZER.encode(" peace")] * 2
    first, second = (score.log_probability for score in reader.score([(context, o) for o in options], "mine"))
    assert second - first == pytest.approx(differences(reader.model, context, options)[1], abs=1e-4) != 0
    (request,) = encode_pairs(TOKENIZER, [(" wor", "ld")], 64).requests
    assert harness_pair(TOKENIZER, " wor", "ld")[1] == []  # which it can't score
    assert request == ([TOKENIZER.start_token], TOKENIZER.encode(" world"))


def test_options_of_one_context_are_scored_from_one_token_on(reader, capsys):
    """Wherever the context is cut, differences of scores are those of the whole texts' log-probabilities."""
    draw, merged = random.Random(0), 0
    for _ in range(60):
        start = draw.randrange(len(PROSE) // 2)
        cut = start + draw.randrange(1, 40)
        context = PROSE[start:cut].rstrip()
        ends = [PROSE[at : at + draw.randrange(1, 9)] for at in (cut, *draw.choices(range(200), k=3))]
        options = [option for option in ends if option.strip()]
        if not context or not options:
            continue
        scores = [score.log_probability for score in reader.score([(context, o) for o in options], "mine")]
        expected = differences(reader.model, context, options)
        assert [score - scores[0] for score in scores] == pytest.approx(expected, abs=1e-3)
        before = TOKENIZER.encode(context)
        merged += any(TOKENIZER.encode(context + option)[: len(before)] != before for option in options)
    assert merged > 20 and "texts a token spans the end of the context" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", [TOKENIZER, CharTokenizer.from_text(PROSE)], ids=["bpe", "characters"])
def test_where_no_token_spans_the_seam_the_split_is_the_harness_s(tokenizer):
    draw, equal = random.Random(1), 0
    for _ in range(200):
        start = draw.randrange(len(PROSE) // 2)
        cut = start + draw.randrange(1, 40)
        context, option = PROSE[start:cut], PROSE[cut : cut + draw.randrange(2, 9)]
        if not context.strip() or not option.strip():
            continue
        (request,), merged = encode_pairs(tokenizer, [(context, option)], 64)
        if not merged:
            equal += 1
            assert tuple(request) == harness_pair(tokenizer, context, option)
    assert equal > 50
