"""examples/word_senses.py: its sentences, the states that a probe reads, and the command."""

import random
from dataclasses import replace

import pytest
import torch

import word_senses
from gpt_arc.errors import entry_point
from gpt_arc.reading import read_json
from helpers import ROOT, randomised
from model import GPT, GPTConfig
from word_senses import NEUTRAL, PLACE, SENSES, SIDES, WORDS

TINY = GPTConfig(block_size=10, vocab_size=len(WORDS), n_layer=2, n_head=2, n_embd=8, positions="rotary")


def words(rows):
    return [[WORDS[word] for word in row] for row in rows.tolist()]


@pytest.mark.parametrize("side", SIDES)
def test_a_labelled_sentence_has_one_cue(side):
    seen = []
    for half in (0, 1):
        rows, senses = word_senses.labelled(200, side, half, random.Random(half))
        cues = set()
        for row, sense in zip(words(rows), senses):
            noun, verb = row[3], row[8]
            cue, neutral = (noun, verb) if side == "before" else (verb, noun)
            assert row[PLACE] == "bank" and cue in SENSES[sense][SIDES[side]]
            assert neutral in NEUTRAL["verb" if side == "before" else "noun"]
            cues.add(cue)
        seen.append(cues)
    assert not seen[0] & seen[1] and seen[0] | seen[1] == {cue for s in SENSES.values() for cue in s[SIDES[side]]}


def test_unlabelled_sentences_keep_to_one_sense():
    of = {word: sense for sense, kinds in SENSES.items() for kind in kinds.values() for word in kind}
    rows = words(word_senses.unlabelled(500, random.Random(0)))
    senses = [{of[word] for word in row if word in of} for row in rows]
    assert max(map(len, senses)) == 1 and 150 < sum(row[PLACE] == "bank" for row in rows) < 350
    assert any(not cues for cues in senses)  # a sentence that doesn't tell


def test_states_are_those_of_the_blocks_worked_by_hand():
    model = randomised(GPT(TINY)).eval()
    rows = word_senses.unlabelled(3, random.Random(0))
    embeddings, first, last = word_senses.states(model, rows)
    assert torch.equal(embeddings, model.token_embedding(rows)[:, PLACE])
    assert torch.allclose(model.final_norm(last), model.hidden(rows)[:, PLACE])
    assert not torch.allclose(first, last)


def test_only_a_bidirectional_state_depends_on_what_follows():
    rows = word_senses.unlabelled(2, random.Random(0))
    changed = rows.clone()
    changed[:, PLACE + 1] = (rows[:, PLACE + 1] + 1) % len(WORDS)
    for attention, same in (("causal", True), ("bidirectional", False)):
        model = randomised(GPT(replace(TINY, attention=attention))).eval()
        pairs = [*zip(word_senses.states(model, rows), word_senses.states(model, changed))]
        assert [torch.allclose(a, b) for a, b in pairs] == [True, same, same]


def test_the_command_continues(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    flags = "--max_iters=2 --n_layer=1 --sentences=40 --output=out/try".split()
    main = entry_point(word_senses.main)
    for seeds in (1, 2):
        output = output_of(main, "word_senses.py", *flags, f"--seeds={seeds}")
    runs = read_json(tmp_path / "out/try/figures.json")["runs"]
    assert [run["seed"] for run in runs] == [1, 2]
    for run in runs:  # one vector for both senses tells nothing: as many are right as the commoner sense has
        for side in SIDES:
            (static,), (of_gpt, _) = run["static vector of bank"][side], run["GPT"][side]
            assert static == of_gpt and 0.2 < static < 0.8
    assert "BERT, block 1" in output and "±" in output
    assert (tmp_path / "out/try/probes.png").stat().st_size > 5000


def test_the_page_has_the_figures_of_the_run():
    page, runs = (
        (ROOT / "docs/results/relatives.md").read_text(),
        read_json(ROOT / "docs/results/word_senses.json")["runs"],
    )
    assert len(runs) == 3
    for cells in word_senses.rows(runs):
        assert f"| {' | '.join(cells)} |" in page
