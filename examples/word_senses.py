"""One word in two senses: what a linear probe reads from each layer's state at "bank", beside static vectors.

    python examples/word_senses.py
    python examples/word_senses.py --seeds=1 --max_iters=20 --output=out/try      a quick look

Sentences come from one template: Ann took the loan and saw the bank lend. Its noun and its verb are about money or
about rivers; either may be neutral. Half of the sentences have another place instead of "bank", such as "lender" or
"shore". A GPT and a BERT of the same blocks learn this language from unlabelled sentences, and score as many tokens.
Static vectors learn it by skip-gram (arXiv:1301.3781), with a full softmax, since there are few words.

Then logistic regression learns which sense "bank" has in sentences with one half of the nouns or verbs, and is tested
on sentences with the other half. Each of these has one cue: the noun before "bank", or the verb after it. A static
vector is the same in both senses; a GPT's state depends on what precedes it, BERT's on both sides.

The script writes OUTPUT/figures.json after each seed, continues from it when called again, and draws OUTPUT/probes.png.
It needs scikit-learn: pip install -e ".[metrics]".
"""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from tqdm import tqdm

from gpt_arc.data.masking import Masking
from gpt_arc.errors import entry_point
from gpt_arc.evaluation.experiments import run_missing
from gpt_arc.evaluation.statistics import mean_and_error, standard_error
from gpt_arc.extras import import_extra
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positive
from gpt_arc.tables import table
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from gpt_arc.training.schedule import learning_rate_at
from model import GPT, GPTConfig

TEMPLATE = "{name} took the {noun} and saw the {place} {verb} ."
NAMES = "Ann Ben Cleo Dan Eve Finn Gail Hal".split()
SENSES = {
    "money": {
        "noun": "money loan cash cheque mortgage savings coins wages debt purse credit pension".split(),
        "place": "lender office broker vault".split(),
        "verb": "lend pay charge insure invest refund profit borrow".split(),
    },
    "river": {
        "noun": "boat fish water reeds mud duck oars heron otter canoe raft net".split(),
        "place": "shore canal marsh ford".split(),
        "verb": "flood erode slope crumble overflow dry freeze soak".split(),
    },
}
NEUTRAL = {"noun": "bag letter hat map".split(), "verb": "appear change stay wait".split()}
WORDS = sorted(
    {*NAMES, *"took the and saw bank .".split(), *sum((sum(s.values(), []) for s in (*SENSES.values(), NEUTRAL)), [])}
)
LENGTH, PLACE = 10, 7  # words of a sentence, and where "bank" stands
SIDES = {"before": "noun", "after": "verb"}  # of "bank": the only cue there
BATCH = 64
MASK_RATE = 0.15
SCORED_BY_GPT = 5  # times as many tokens of a sentence as BERT, which scores two of ten


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    n_layer: Count = 2
    """Blocks of each model, of width 32."""
    max_iters: Count = 300
    """Updates of the GPT and of the static vectors, of 64 sentences. BERT takes five times as many."""
    learning_rate: Positive = 1e-2
    """Peak; rises over the first twentieth of the updates, then falls to zero along a cosine."""
    sentences: Count = 500
    """Sentences that a probe learns from, and as many that test it."""
    seeds: Count = 3
    """Runs of everything."""
    output: Path = Path("out/word_senses")
    """Folder for the results."""


def sentence(sense: str, cues: Mapping[str, Sequence[str]], place: str, rng: random.Random) -> list[int]:
    """Returns a sentence as numbers of words, with a noun and a verb of `cues`, by default of the sense."""
    chosen = {kind: rng.choice(words) for kind, words in {**SENSES[sense], **cues}.items()}
    text = TEMPLATE.format(**chosen | {"name": rng.choice(NAMES), "place": place})
    return [WORDS.index(word) for word in text.split()]


def unlabelled(number: int, rng: random.Random) -> Tensor:
    """Returns sentences (N, LENGTH); half have "bank", and a quarter of nouns and of verbs are neutral."""
    rows = []
    for _ in range(number):
        sense = rng.choice([*SENSES])
        cues = {kind: words for kind, words in NEUTRAL.items() if rng.random() < 0.25}
        rows.append(sentence(sense, cues, rng.choice(["bank", rng.choice(SENSES[sense]["place"])]), rng))
    return torch.tensor(rows)


def labelled(number: int, side: str, half: int, rng: random.Random) -> tuple[Tensor, list[str]]:
    """Returns rows (N, LENGTH) with "bank" and one cue, and their senses. Each `half`, 0 or 1, has cues of its own."""
    kind, senses = SIDES[side], [rng.choice([*SENSES]) for _ in range(number)]
    cues = {sense: NEUTRAL | {kind: SENSES[sense][kind][half::2]} for sense in SENSES}
    return torch.tensor([sentence(sense, cues[sense], "bank", rng) for sense in senses]), senses


def train(
    module: nn.Module, loss_of: Callable[[Tensor], Tensor], steps: int, learning_rate: float, rng: random.Random
) -> None:
    """Trains a module by `loss_of`, the mean loss () of sentences (B, LENGTH)."""
    config = TrainingConfig(max_iters=steps, warmup=0.05, learning_rate=learning_rate, min_lr=0.0, weight_decay=0.0)
    updater, name = Updater(module, config, torch.device("cpu"), "float32"), type(module).__name__
    for step in tqdm(range(steps), desc=name, unit="step", disable=None):
        loss = loss_of(unlabelled(BATCH, rng))
        updater.backward(loss)
        updater.update(learning_rate_at(step, config), loss.detach())


def language_model(attention: Literal["causal", "bidirectional"], options: Options, seed: int) -> GPT:
    """Trains a GPT or a BERT, which differ in attention and objective only."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            block_size=LENGTH, vocab_size=len(WORDS) + 1, n_layer=options.n_layer, n_head=2, n_embd=32,
            positions="rotary", norm="rmsnorm", bias=False, attention=attention,
        )
    )  # fmt: skip
    masking = Masking(token=len(WORDS), words=len(WORDS), rate=MASK_RATE, seed=seed)
    rng = random.Random(seed)

    def loss_of(rows: Tensor) -> Tensor:
        if attention == "causal":
            loss = model(rows[:, :-1], rows[:, 1:])
        else:
            numbers = [rng.randrange(1 << 32) for _ in rows]
            loss = model(*masking.hide(rows, torch.ones_like(rows, dtype=torch.bool), numbers))
        return loss.total / loss.count

    steps = options.max_iters * (1 if attention == "causal" else SCORED_BY_GPT)
    train(model, loss_of, steps, options.learning_rate, rng)
    return model.eval()


def static_vectors(options: Options, seed: int) -> Tensor:
    """Trains a vector (V, 32) for each word by skip-gram: predict each other word of the sentence."""
    torch.manual_seed(seed)
    vectors, head = nn.Embedding(len(WORDS), 32), nn.Linear(32, len(WORDS), bias=False)
    nn.init.normal_(vectors.weight, std=0.02)
    others = ~torch.eye(LENGTH, dtype=torch.bool)

    def loss_of(rows: Tensor) -> Tensor:
        scores = head(vectors(rows)).log_softmax(-1)  # (B, LENGTH, V)
        targets = rows[:, None].expand(-1, LENGTH, -1)  # (B, LENGTH, LENGTH)
        return -scores.gather(-1, targets)[:, others].mean()

    train(nn.ModuleList([vectors, head]), loss_of, options.max_iters, options.learning_rate, random.Random(seed))
    return vectors.weight.detach()


@torch.no_grad()
def states(model: GPT, rows: Tensor) -> list[Tensor]:
    """Returns the states (B, C) at "bank" of the embeddings and after each block."""
    kept: list[Tensor] = []
    modules = model.dropout, *model.blocks
    hooks = [module.register_forward_hook(lambda _, __, output: kept.append(output[:, PLACE])) for module in modules]
    model.hidden(rows)
    for hook in hooks:
        hook.remove()
    return kept


def probe(train: tuple[Tensor, list[str]], test: tuple[Tensor, list[str]]) -> float:
    """Returns the accuracy on `test` of logistic regression on standardised features (N, C)."""
    pipeline = import_extra("sklearn.pipeline").make_pipeline(
        import_extra("sklearn.preprocessing").StandardScaler(),
        import_extra("sklearn.linear_model").LogisticRegression(max_iter=1000),
    )
    return float(pipeline.fit(*train).score(*test))


def measure(options: Options, seed: int) -> dict:
    """Trains the models of a seed. Returns the accuracies of probes by what they read and the side of the cue."""
    vectors = static_vectors(options, seed)
    features = {
        "static vector of bank": lambda rows: [vectors[rows[:, PLACE]]],
        "mean static vector of the sentence": lambda rows: [vectors[rows].mean(1)],
        "GPT": partial(states, language_model("causal", options, seed)),
        "BERT": partial(states, language_model("bidirectional", options, seed)),
    }
    rng = random.Random(seed + 1000)
    result: dict = {name: {} for name in features}
    for side in SIDES:
        learnt, new = (labelled(options.sentences, side, half, rng) for half in (0, 1))
        for name, of in features.items():
            layers = zip(of(learnt[0]), of(new[0]))
            result[name][side] = [probe((seen, learnt[1]), (unseen, new[1])) for seen, unseen in layers]
    return result


def rows(results: list[dict]) -> list[list]:
    """Returns the table in percent."""
    body = []
    for name in [name for name, value in results[0].items() if isinstance(value, dict)]:
        layers = range(len(results[0][name]["before"]))
        for layer in layers:
            label = name if len(layers) == 1 else f"{name}, {f'block {layer}' if layer else 'embeddings'}"
            cells = [mean_and_error([100 * result[name][side][layer] for result in results], 1) for side in SIDES]
            body.append([label, *cells])
    return [["sense of bank, % right", *(f"cue {side}" for side in SIDES)], *body]


def plot(results: list[dict], path: Path) -> None:
    """Plots the accuracy of probes by layer, with bars of a standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("GPT", "o-"), ("BERT", "s--")):
        for side in SIDES:
            layers = [*zip(*(result[name][side] for result in results))]
            errors = [standard_error(layer) for layer in layers]
            axes.errorbar(range(len(layers)), [fmean(layer) for layer in layers], errors, fmt=style, markersize=4,
                          capsize=2, label=f"{name}, cue {side}")  # fmt: skip
    axes.axhline(0.5, color="grey", linestyle=":", label="chance")
    axes.set_xticks(range(len(layers)), ["embeddings", *(f"block {i}" for i in range(1, len(layers)))])
    axes.set_ylabel("share of senses that a probe gets right")
    axes.legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    torch.set_num_threads(1)  # a second gains little with models this small, and costs much on busy cores
    import_extra("sklearn.linear_model")
    settings = {name: getattr(options, name) for name in ("n_layer", "max_iters", "learning_rate", "sentences")}
    cases = [{"seed": seed} for seed in range(1, options.seeds + 1)]
    results = run_missing(options.output / "figures.json", settings, cases, partial(measure, options))
    print(table(rows(results)))
    plot(results, options.output / "probes.png")


if __name__ == "__main__":
    entry_point(main)()
