"""A simulated judge with a known utility: it ranks responses to instructions and measures models.

    python examples/instruction_judge.py out/sft --rank data/instructgpt/train.jsonl --output rankings.jsonl
    python examples/instruction_judge.py out/sft --rank data/instructgpt/train.jsonl --flaw 0.5 --output flawed.jsonl
    python examples/instruction_judge.py out/ppo --measure data/instructgpt/test.jsonl --output utility.json
    python examples/instruction_judge.py --bayes held_out.jsonl
    python stages/ppo.py out/sft --prompts data/instructgpt/train.jsonl --reward out/reward \\
        --monitor instruction_judge:utility                       needs this folder on PYTHONPATH

The utility of a response is 10 times the number of letters in the right place over the length of the response or the
right answer, whichever is longer. The judge adds Gumbel noise to each utility and ranks by the sum, so it prefers a to
b with probability sigmoid(u_a - u_b), whatever else is ranked: the Bradley-Terry and Plackett-Luce models.
`flaw` adds that much utility for each letter, so a flawed judge prefers long responses.
"""

import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Natural, NonNegative, Positional, Seed
from gpt_arc.tables import counted, to_json

SCALE = 10.0  # utility of a right response; one letter of five is worth 2 and wins 88% of comparisons
MOST = 18  # longest response in tokens


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    model: Positional[str | None] = None
    """A model trained by stages/sft.py, or one fine-tuned further from such a model."""
    rank: Path | None = None
    """Prompts; the model responds to them, and the judge ranks the responses."""
    measure: Path | None = None
    """Prompts; the model responds once to each, and the responses' utility is measured."""
    bayes: Path | None = None
    """Rankings; computes the best possible accuracy on their pairs."""
    output: Path | None = None
    """File for the rankings (.jsonl) or the figures (.json)."""
    limit: Count | None = None
    """Number of prompts to use, after `skip`. None: all."""
    skip: Natural = 0
    """Number of prompts to skip."""
    responses: Annotated[int, Ge(2)] = 4
    """Responses to rank per prompt."""
    flaw: float = 0.0
    """Utility the judge adds per letter of a response."""
    temperature: NonNegative = 1.0
    """Sampling temperature."""
    seed: Seed = 0
    """Random seed."""


def share_right(answer: str, response: str) -> float:
    """Returns the number of equal letters in equal places over the longer length."""
    return sum(a == b for a, b in zip(answer, response)) / max(len(answer), len(response))


def utility(rows: Sequence[dict[str, Any]], responses: Sequence[str]) -> list[float]:
    """Returns the utility of each response, in the form that `stages/ppo.py` calls a reward."""
    return [SCALE * share_right(row["answer"], response) for row, response in zip(rows, responses)]


def ranks_of(utilities: Sequence[float], rng: random.Random) -> list[int]:
    """Returns ranks, 1 for the best, drawn from the Plackett-Luce model by Gumbel noise."""
    noisy = [u - math.log(rng.expovariate(1.0)) for u in utilities]
    order = sorted(range(len(noisy)), key=lambda i: -noisy[i])
    return [order.index(i) + 1 for i in range(len(noisy))]


def bayes_accuracy(rankings: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Returns the expected accuracy on pairs of a predictor that knows the utilities, and the number of pairs."""
    gaps = [abs(a - b) for row in rankings for a, b in combinations(row["utilities"], 2)]
    return statistics.fmean(1 / (1 + math.exp(-gap)) for gap in gaps), len(gaps)


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a .jsonl file. Raises UserError."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def written(options: Options, rows: Sequence[dict[str, Any]], each: int) -> list[list[str]]:
    """Returns `each` responses of the model to every prompt; one that doesn't end has MOST letters."""
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
    tokens: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad():
        for first in range(0, len(prompts), 256):
            batch = prompts[first : first + 256]
            generators = row_generators(options.seed, range(first, first + len(batch)))
            stopped = lambda row, token: token in chat.ends  # noqa: E731
            for step in generate(decoder, batch, MOST, sampling, generators=generators, stopped=stopped):
                for i, token in zip(step.rows, step.tokens):
                    tokens[first + i].append(token)
    texts = [chat.decode(response) for response in tokens]
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def rank(options: Options, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with the model's responses, their ranks and utilities."""
    rng = random.Random(options.seed)
    rankings = []
    for row, responses in zip(rows, written(options, rows, options.responses)):
        utilities = [u + options.flaw * len(r) for u, r in zip(utility([row] * len(responses), responses), responses)]
        rankings.append({**row, "responses": responses, "ranks": ranks_of(utilities, rng), "utilities": utilities})
    return rankings


def measure(options: Options, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the mean utility of the model's responses, with details."""
    responses = [response for (response,) in written(options, rows, 1)]
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
        print(f"{counted(pairs, 'pair')}: the best possible accuracy is {accuracy:.4f}")
    elif options.rank:
        if options.output is None:
            raise UserError("name the file for the rankings with --output")
        rankings = rank(options, rows)
        write_file(options.output, "".join(to_json(row) + "\n" for row in rankings))
        accuracy, pairs = bayes_accuracy(rankings)
        print(
            f"{options.output}: {counted(len(rankings), 'ranking')}, {counted(pairs, 'pair')}; "
            f"best possible accuracy {accuracy:.4f}"
        )
    else:
        figures = measure(options, rows)
        print(to_json(figures, indent=1))
        if options.output:
            write_file(options.output, to_json(figures, indent=1) + "\n")


if __name__ == "__main__":
    entry_point(main)()
