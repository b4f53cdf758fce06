"""examples/chain_of_thought.py: its problems and documents, how answers are taken, and the command."""

import random
from statistics import fmean

import pytest
import torch
from scipy.stats import binomtest

import chain_of_thought
from chain_of_thought import BLANK, DIGITS, IDS, KINDS, MOST, VOCABULARY, Options
from gpt_arc.errors import entry_point
from gpt_arc.reading import read_json
from helpers import ROOT
from model import GPT, GPTConfig


def problems(held_out, number=300):
    rng = random.Random(int(held_out))
    return [chain_of_thought.draw_problem(rng.randint(1, MOST), held_out, rng) for _ in range(number)]


def test_steps_are_those_of_python():
    for problem in problems(held_out=False):
        text = problem[0]
        for operation, step in zip(problem[1:], chain_of_thought.steps_of(problem), strict=True):
            text = f"({text}){operation}"
            assert step == str(eval(text) % 10), text


def test_every_operation_matters():
    for operation in chain_of_thought.OPERATIONS:
        assert {chain_of_thought.steps_of((digit, operation))[0] for digit in DIGITS} == {*DIGITS}


def test_no_problem_of_the_test_is_trained_on():
    assert not {*problems(held_out=False, number=2000)} & {*problems(held_out=True)}
    pairs = {(digit, operation): None for digit in DIGITS for operation in chain_of_thought.OPERATIONS}
    tested = {p for p in problems(held_out=True, number=2000) if len(p) == 2}
    assert tested < {*pairs} and 10 < len(tested) < 40  # of 230


def test_documents_are_as_described():
    rng = random.Random(0)
    problem = ("7", "+5", "*3", "-2")
    blanks = BLANK * (MOST - 3)
    texts = {kind: ["".join(part) for part in chain_of_thought.document(problem, kind, rng)] for kind in KINDS}
    assert texts["direct"] == [f"7+5*3-2{blanks}=", "4"]
    assert texts["steps"] == [f"7+5*3-2{blanks}>", "264=4"]
    assert texts["dots"] == [f"7+5*3-2{blanks}....=", "4"]
    prompt, written = texts["random digits"]
    assert prompt.startswith(f"7+5*3-2{blanks}?") and prompt[-4:-1].isdigit() and written == "4"
    for kind in KINDS:
        documents = [chain_of_thought.document(p, kind, rng) for k in range(1, MOST + 1) for p in [("1", *["+1"] * k)]]
        assert fmean(len(a) + len(b) for a, b in documents) == chain_of_thought.length(kind)


def test_a_batch_scores_what_the_model_writes():
    tokens, targets = chain_of_thought.batch(KINDS, 8, random.Random(0))
    for i, (row, scored) in enumerate(zip(tokens.tolist(), targets.tolist())):
        text = "".join(VOCABULARY[token] for token in row)
        written = "".join(VOCABULARY[token] for token in scored if token >= 0)
        assert len(written) == 1 if KINDS[i % 4] != "steps" else written[-1] == written[-3] and written[-2] == "="
        places = [place for place, token in enumerate(scored) if token >= 0]
        assert places == [*range(places[0], places[-1] + 1)] and text[: places[0] + 1].count("=") <= 1


class Solver:
    """Writes the right continuation of every prompt, except that direct answers are 0."""

    def __call__(self, tokens):
        logits = torch.zeros(*tokens.shape, len(VOCABULARY))
        for i, row in enumerate(tokens.tolist()):
            text = [VOCABULARY[token] for token in row]
            problem = [token for token in text[: MOST + 1] if token != BLANK]
            writes = chain_of_thought.document(problem, "steps", random.Random(0))[1]
            done = len(text) - MOST - 2
            logits[i, -1, IDS[writes[done] if text[MOST + 1] == ">" else "0"]] = 1
        return logits


def test_answers_are_those_after_the_steps():
    drawn = [p for p in problems(held_out=True) if len(p) == 5]
    solver, rng = Solver(), random.Random(0)
    assert chain_of_thought.answers_right(solver, drawn, "steps", rng) == [1] * len(drawn)
    zeros = [int(chain_of_thought.steps_of(p)[-1] == "0") for p in drawn]
    assert chain_of_thought.answers_right(solver, drawn, "dots", rng) == zeros


def test_p_values_are_those_of_a_binomial_test(monkeypatch):
    monkeypatch.setattr(chain_of_thought, "train", lambda *_: GPT(GPTConfig(20, 10, 1, 1, 8)))
    given = {"direct": [0, 0, 0, 1] * 5, "steps": [1, 1, 1, 0] * 5, "dots": [0] * 20, "random digits": [1, 1, 1, 0] * 5}
    monkeypatch.setattr(chain_of_thought, "answers_right", lambda model, problems, kind, rng: given[kind])
    result = chain_of_thought.measure(Options(), "mixed", 8, 1)
    for kind, better, worse in (("direct", 15, 5), ("dots", 15, 0)):
        assert result[kind]["p"] == [pytest.approx(binomtest(better, better + worse).pvalue)] * MOST
    assert result["steps"]["p"] == result["random digits"]["p"] == [1.0] * MOST
    assert result["steps"]["accuracy"] == [0.75] * MOST


def test_the_command_continues(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    flags = "--widths 8 16 --max_iters=2 --tokens=60 --problems=5 --output=out/try".split()
    main = entry_point(chain_of_thought.main)
    for seeds in (1, 2):
        output = output_of(main, "chain_of_thought.py", *flags, f"--seeds={seeds}")
    runs = read_json(tmp_path / "out/try/figures.json")["runs"]
    assert [(run["mix"], run["width"], run["seed"]) for run in runs] == [
        (mix, width, seed) for seed in (1, 2) for mix, width in (("mixed", 8), ("mixed", 16), ("direct alone", 16))
    ]
    assert "±" in output and "steps 16.5" in output
    assert (tmp_path / "out/try/accuracy.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flag", "reason"), [("--widths=12", "width = 12 must be a multiple of 8"), ("--tokens=0", "must be at least 1")]
)
def test_mistakes_are_refused(flag, reason, tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    assert reason in output_of(entry_point(chain_of_thought.main), "chain_of_thought.py", flag)
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_figures_of_the_run():
    page = (ROOT / "docs/results/in_context.md").read_text()
    runs = read_json(ROOT / "docs/results/chain_of_thought.json")["runs"]
    for cells in [*chain_of_thought.rows(runs), *chain_of_thought.p_rows(runs)]:
        assert f"| {' | '.join(map(str, cells))} |" in page
