"""A simulated judge of responses to instructions, whose taste is known: it ranks, and it measures models.

    python examples/instruction_judge.py out/sft --rank data/instructgpt/train.jsonl --output rankings.jsonl
    python examples/instruction_judge.py out/sft --rank data/instructgpt/train.jsonl --flaw 0.5 --output flawed.jsonl
    python examples/instruction_judge.py out/ppo --measure data/instructgpt/test.jsonl --output utility.json
    python examples/instruction_judge.py --bayes held_out.jsonl
    python stages/ppo.py out/sft --prompts data/instructgpt/train.jsonl --reward out/reward \\
        --monitor instruction_judge:utility                       with this folder on PYTHONPATH

The utility of a response is 10 times the share of its letters that stand where the right answer has them, of as many as
the longer of the two has. The judge adds noise of Gumbel's distribution to the utility of each response and ranks by
the sum, so that it puts a before b with the probability sigmoid(u_a - u_b), whatever else is ranked: the model of
Bradley and Terry, and of Plackett and Luce. With a `flaw` it likes long responses, so much the letter.
"""

import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import tyro
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT

SCALE = 10.0  # utility of a right response: one letter of five more or less is worth 2, and wins 88 of 100 times
MOST = 18  # tokens of a response, at most


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    model: tyro.conf.Positional[str | None] = None
    """A model that stages/sft.py has taught to converse, or one that began as such."""
    rank: Path | None = None
    """Prompts to which the model writes responses, which the judge ranks."""
    measure: Path | None = None
    """Prompts to which the model writes a response each, whose utility is measured."""
    bayes: Path | None = None
    """Rankings: the share of their pairs that the best possible predictor gets right."""
    output: Path | None = None
    """File for the rankings (.jsonl) or the figures (.json)."""
    limit: int | None = None
    """Take so many prompts, the first ones after `skip`."""
    skip: int = 0
    """Leave out so many prompts."""
    responses: int = 4
    """How many responses of each prompt are ranked."""
    flaw: float = 0.0
    """What a letter more is worth to the judge."""
    temperature: float = 1.0
    """Of the responses."""
    seed: int = 0
    """The source of all randomness."""


def share_right(answer: str, response: str) -> float:
    """Of the letters of the longer one, how many stand in both at the same place."""
    return sum(a == b for a, b in zip(answer, response)) / max(len(answer), len(response))


def utility(rows: Sequence[dict[str, Any]], responses: Sequence[str]) -> list[float]:
    """What the judge likes, as `stages/ppo.py` calls a reward."""
    return [SCALE * share_right(row["answer"], response) for row, response in zip(rows, responses)]


def ranks_of(utilities: Sequence[float], rng: random.Random) -> list[int]:
    """Ranks from 1 for the best: Plackett and Luce's model, by Gumbel noise."""
    noisy = [u - math.log(rng.expovariate(1.0)) for u in utilities]
    order = sorted(range(len(noisy)), key=lambda i: -noisy[i])
    return [order.index(i) + 1 for i in range(len(noisy))]


def bayes_accuracy(rankings: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """The share of pairs that a predictor who knows the utilities is expected to get right, and how many there are."""
    gaps = [abs(a - b) for row in rankings for a, b in combinations(row["utilities"], 2)]
    return statistics.fmean(1 / (1 + math.exp(-gap)) for gap in gaps), len(gaps)


def read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def written(options: Options, rows: Sequence[dict[str, Any]], each: int) -> list[list[str]]:
    """Responses of the model, `each` to every prompt; one that does not end has MOST letters."""
    import torch

    from gpt_arc.chat.format import Turn, load_chat_model
    from gpt_arc.decoding.decoder import Decoder
    from gpt_arc.decoding.generate import generate
    from gpt_arc.decoding.probabilities import row_generators
    from gpt_arc.decoding.settings import Sampling

    if options.model is None:
        raise UserError("name the model that writes the responses")
    model, _, chat = load_chat_model(options.model)
    decoder, sampling = Decoder(model.eval()), Sampling(temperature=options.temperature)
    prompts = [chat.prompt([Turn("user", row["prompt"])]) for row in rows for _ in range(each)]
    found: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad():
        for first in range(0, len(prompts), 256):
            some = prompts[first : first + 256]
            generators = row_generators(options.seed, range(first, first + len(some)))
            stopped = lambda row, token: token == chat.end  # noqa: E731
            for step in generate(decoder, some, MOST, sampling, generators=generators, stopped=stopped):
                for i, token in zip(step.rows, step.tokens):
                    found[first + i].append(token)
    texts = [chat.decode(response) for response in found]
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def rank(options: Options, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rng = random.Random(options.seed)
    rankings = []
    for row, responses in zip(rows, written(options, rows, options.responses)):
        utilities = [u + options.flaw * len(r) for u, r in zip(utility([row] * len(responses), responses), responses)]
        rankings.append({**row, "responses": responses, "ranks": ranks_of(utilities, rng), "utilities": utilities})
    return rankings


def measure(options: Options, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    responses = [one for (one,) in written(options, rows, 1)]
    utilities = utility(rows, responses)
    kinds = sorted({row["kind"] for row in rows})
    return {
        "prompts": len(rows),
        "utility": statistics.fmean(utilities),
        "standard_error": statistics.stdev(utilities) / math.sqrt(len(rows)),
        "right": statistics.fmean(u == SCALE for u in utilities),
        "letters": statistics.fmean(map(len, responses)),
        "by_kind": {k: statistics.fmean(u for u, row in zip(utilities, rows) if row["kind"] == k) for k in kinds},
        "examples": [[row["prompt"], response] for row, response in zip(rows[:16], responses)],
    }


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    path = options.rank or options.measure or options.bayes
    if path is None:
        raise UserError("there is nothing to do: name --rank, --measure or --bayes")
    rows = read(path)[options.skip :][: options.limit]
    if options.bayes:
        accuracy, pairs = bayes_accuracy(rows)
        print(f"pairs {pairs:,}: the best possible accuracy is {accuracy:.4f}")
    elif options.rank:
        if options.output is None:
            raise UserError("name the file for the rankings by --output")
        rankings = rank(options, rows)
        write_file(options.output, "".join(json.dumps(row) + "\n" for row in rankings))
        accuracy, pairs = bayes_accuracy(rankings)
        print(
            f"{options.output}: {len(rankings):,} rankings, {pairs:,} pairs; the best possible accuracy {accuracy:.4f}"
        )
    else:
        figures = measure(options, rows)
        print(json.dumps(figures, indent=1))
        if options.output:
            write_file(options.output, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    entry_point(main)()
