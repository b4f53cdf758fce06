"""Figures that introductions to GPT state, beside what this program's functions compute.

    python examples/worked_numbers.py

A row has what is often stated, what is right, and the function that computes it here. Many stated figures are right;
others are rounded from other sizes, summed in the wrong place or impossible. The exit code is 1 if a function computes
anything but the right figure.

GPT-1 is Radford et al. 2018, GPT-2 Radford et al. 2019, GPT-3 arXiv:2005.14165, BERT arXiv:1810.04805.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import math
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

import numpy_gpt
from gpt_arc.alignment.losses import ranking_loss
from gpt_arc.data.datasets import Source, mixture_shares
from gpt_arc.data.masking import scored_tokens
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.decoding.probabilities import filtered_probabilities
from gpt_arc.errors import entry_point
from gpt_arc.files import resource
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, combined_loss, make_batch
from gpt_arc.finetuning.examples import Columns, Example, SpecialTokens, sequences_of
from gpt_arc.flags import parse_flags
from gpt_arc.nn.attention import attend
from gpt_arc.nn.head_loss import HeadLoss
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.budget import MixtureClaim, serving_memory
from gpt_arc.planning.scaling_laws import PUBLISHED
from gpt_arc.settings import STRICT
from gpt_arc.tables import table
from gpt_arc.weights.edit import with_more_tokens
from model import GPT, GPTConfig

Figure = float | Sequence[float]


@dataclass(frozen=True, config=STRICT)
class Options:
    """There are none: --help alone is answered."""


class Row(NamedTuple):
    """A figure."""

    what: str
    stated: str
    right: Figure  # to as many digits as are certain
    computed: Figure
    by: str  # what computes it

    @property
    def holds(self) -> bool:
        """Whether `computed` is `right` to within half of the last digit."""
        right, computed = (x if isinstance(x, Sequence) else [x] for x in (self.right, self.computed))
        near = (abs(a - b) <= 0.5 * 10.0 ** -digits(a) + 1e-9 * abs(a) for a, b in zip(right, computed))
        return len(right) == len(computed) and all(near)


def digits(number: float) -> int:
    """How many decimals a figure is written with."""
    return len(f"{number:.10g}".partition(".")[2]) if isinstance(number, float) else 0


def shown(figure: Figure, right: Figure) -> str:
    """A figure with as many decimals as the right one."""
    if isinstance(figure, Sequence):
        assert isinstance(right, Sequence)
        return " ".join(map(shown, figure, right))
    assert not isinstance(right, Sequence)
    return f"{figure:,.{digits(right)}f}"


def sketch(name: str, **settings) -> GPT:
    """The model of a config, without memory for its weights."""
    config = GPTConfig(**tomllib.loads(resource(f"configs/{name}.toml").read_text())["model"])
    with meta_device():
        return GPT(replace(config, **settings))


def nats(probabilities: Sequence[float]) -> list[float]:
    """Losses of a language model that gives these probabilities to the right tokens, of two that there are."""
    logits = torch.tensor([[p, 1 - p] for p in probabilities], dtype=torch.float64).log()
    target, head = torch.zeros(1, dtype=torch.int64), torch.eye(2, dtype=torch.float64)
    return [HeadLoss.apply(row[None], head, None, target, None, False).item() for row in logits]


def sizes() -> Iterator[Row]:
    by = "GPT.num_parameters"
    for what, stated, right, model in (
        ("GPT-1, parameters", "117M", 116_534_784, sketch("gpt1")),
        ("GPT-2 small", "117M", 124_439_808, sketch("gpt2")),
        ("GPT-2 medium", "345M", 354_823_168, sketch("gpt2_medium")),
        ("GPT-2 large", "762M", 774_030_080, sketch("gpt2_large")),
        ("GPT-2 XL", "1542M", 1_557_611_200, sketch("gpt2_xl")),
        ("GPT-3 XL, whose 24 heads of 128 don't make 2048", "1.3B", 1_315_723_264, sketch("gpt3_xl")),
        ("GPT-3 13B, printed with the width 5140", "13B", 12_853_386_240, sketch("gpt3_13b")),
        ("GPT-3 175B", "175B", 174_604_259_328, sketch("gpt3_175b")),
        ("BERT-base", "110M", 109_514_298, sketch("bert")),
        ("a character model of 4 layers of width 64", "208,961", 208_961, sketch("char_tiny")),
    ):
        yield Row(what, stated, right, model.num_parameters(), by)
    yield Row("its N for Kaplan's law: no tables, no head", "-", 200_064, sketch("char_tiny").num_parameters(False), by)
    gpt1 = sketch("gpt1")
    yield Row("GPT-1 with the three tokens of fine-tuning", "+2,304", 116_537_088,
              with_more_tokens(gpt1, 3).num_parameters(), "with_more_tokens")  # fmt: skip
    tables = sketch("gpt1", vocab_size=40_000)
    saved = sketch("gpt1", vocab_size=40_000, tied_head=False).num_parameters() - tables.num_parameters()
    yield Row("tables of 40,000 tokens and 512 positions", "-", 31_113_216,
              tables.num_parameters() - tables.num_parameters(embeddings=False), by)  # fmt: skip
    yield Row("what tying the head to them saves", "-", 30_720_000, saved, by)
    for classes, right in ((3, 2_304), (4, 3_072)):
        config = ClassifierConfig("classification", tuple("abcd"[:classes]), SpecialTokens(0, 1, 2), Columns("text"), 8)
        head = Classifier(gpt1, config).head.weight
        yield Row(f"GPT-1's head of {classes} classes", f"{right:,}", right, head.numel(), "Classifier")
    yield Row("GPT-1's head size, whose root divides scores", "64", 64, gpt1.config.head_width, "GPTConfig.head_width")
    yield Row("that character model's context", "32", 8, sketch("char_tiny").config.block_size, "configs/char_tiny")


def losses() -> Iterator[Row]:
    law = PUBLISHED["kaplan_n"]
    for name, n, right in (
        ("125M", 125e6, 2.782), ("350M", 350e6, 2.573), ("760M", 760e6, 2.426), ("1.3B", 1.3e9, 2.329),
        ("2.7B", 2.7e9, 2.203), ("6.7B", 6.7e9, 2.056), ("13B", 13e9, 1.955), ("175B", 175e9, 1.604),
    ):  # fmt: skip
        yield Row(f"L = (8.8e13 / N)^.076 at {name}", "-", right, float(law.loss(x=n)), "Law.loss")
    for better, worse, right in ((2.5, -1.0, 0.0298), (-0.5, 1.5, 2.1269)):
        scores = torch.tensor([better, worse], dtype=torch.float64)
        first = torch.tensor([0])
        loss = ranking_loss(scores, first, first + 1, torch.ones(1)).item()
        yield Row(f"Bradley-Terry loss of scores {better:g} and {worse:g}", "-", right, loss, "ranking_loss")
    two = sum(nats([0.40, 0.60]))
    yield Row("loss of probabilities .40 and .60, in all", "1.427", 1.427, two, "HeadLoss")
    yield Row("its perplexity", "2.04", 2.041, math.exp(two / 2), "HeadLoss")
    one = nats([0.30])[0]
    yield Row("loss and perplexity of a probability of .30", "-", (1.204, 3.333), (one, math.exp(one)), "HeadLoss")
    language = nats([0.02, 0.08, 0.35, 0.05, 0.01])
    yield Row("loss of .02 .08 .35 .05 .01, in all", "15.089", 15.088, sum(language), "HeadLoss")
    yield Row("its mean", "3.018", 3.018, sum(language) / 5, "HeadLoss")
    total = combined(nats([0.85])[0], sum(language) / 5)
    yield Row("with a class of .85: L2 + .5 L1", "1.672", 1.6714, total, "combined_loss")
    yield Row("L2 of .45 and L1 of 12.3, called a mean of 25", "6.6", 0.696, combined(0.45, 12.3 / 25), "combined_loss")
    yield Row("perplexity if 12.3 were one, among 40,000 tokens", "-", 219_696, math.exp(12.3), "exp")
    floor = numpy_gpt.loss_floor(numpy_gpt.SENTENCES)
    yield Row("least loss on five sentences, and perplexity", "1.052, 2.9", (0.4758, 1.609), (floor, math.exp(floor)),
              "numpy_gpt.loss_floor")  # fmt: skip


def combined(task: float, language: float) -> float:
    return combined_loss(torch.tensor(task), torch.tensor(language), 0.5).item()


def attention() -> Iterator[Row]:
    """Four tokens of width 4 that are their own queries, keys and values; two of them are given, of two the scores."""
    first, second = [1.0, 0.5, 0.3, 0.1], [0.2, 1.0, 0.7, 0.4]
    tokens = torch.tensor([[[first, second]]], dtype=torch.float64)
    scores = tokens @ tokens.mT / 2
    yield Row("scores of tokens 1 and 2, after division by 2", ".675 .475 .845", (0.675, 0.475, 0.845),
              (scores[0, 0, 0, 0].item(), *scores[0, 0, 1].tolist()), "products")  # fmt: skip
    queries = torch.tensor([
        [0.675, 0, 0, 0], [0.475, 0.845, 0, 0], [0.535, 0.670, 1.045, 0], [0.520, 0.715, 0.835, 0.950],
    ], dtype=torch.float64)  # fmt: skip
    identity = torch.eye(4, dtype=torch.float64)
    weights = attend(queries[None, None], 2 * identity[None, None], identity[None, None], None, 0.0)[0, 0]
    for row, stated, right in (
        (1, ".41 .59", (0.409, 0.591)),
        (2, ".26 .30 .44", (0.2625, 0.3004, 0.4371)),
        (3, ".19 .23 .26 .29", (0.195, 0.237, 0.267, 0.300)),
    ):
        yield Row(f"causal attention, row {row + 1}", stated, right, weights[row, : row + 1].tolist(), "attend")
    mixed = attend(tokens, tokens, tokens, None, 0.0)[0, 0, 1]
    yield Row("output of row 2", ".53 .80 .54 .28", (0.527, 0.796, 0.537, 0.277), mixed.tolist(), "attend")


def forward() -> Iterator[Row]:
    """A model of five words and width 4: embeddings, and the head tied to them."""
    model = GPT(GPTConfig(block_size=3, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    words = [
        [0.2, -0.1, 0.5, 0.3],
        [0.8, 0.4, -0.2, 0.1],
        [0.1, 0.7, 0.3, -0.4],
        [0.3, 0.6, 0.2, -0.3],
        [-0.5, 0.2, 0.4, 0.6],
    ]
    places = [[0.0, 0.1, 0.0, -0.1], [0.1, 0.0, -0.1, 0.1], [0.0, -0.1, 0.1, 0.0]]
    model.token_embedding.weight.data, model.position_embedding.weight.data = torch.tensor(words), torch.tensor(places)
    embedded = model.embed(torch.tensor([[0, 1, 2]]), torch.arange(3))[0]
    for i, right in enumerate([(0.2, 0.0, 0.5, 0.2), (0.9, 0.4, -0.3, 0.2), (0.1, 0.6, 0.4, -0.4)], 1):
        stated = " ".join(map(str, right))
        yield Row(f"embedding of word {i} and its place", stated, right, embedded[i - 1].tolist(), "GPT.embed")
    hidden = torch.tensor([-0.2, 0.9, -1.0, 0.3])
    logits = model.logits(hidden)
    yield Row("scores of the five words", "-.54 .43 .19 .19 .06", (-0.54, 0.43, 0.19, 0.19, 0.06), logits.tolist(),
              "GPT.logits")  # fmt: skip
    yield Row("their softmax", ".098 .259 .204 .204 .179", (0.104, 0.274, 0.216, 0.216, 0.190),
              filtered_probabilities(logits).tolist(), "filtered_probabilities")  # fmt: skip
    yield from classification(hidden)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        deep = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=8, n_head=4, n_embd=256))
    weights = (x.flatten() for name, x in deep.state_dict().items() if name.endswith("mlp.projection.weight"))
    spread = torch.cat([*weights]).std().item()
    yield Row("deviation of 8 blocks' residual weights: .02 / 4", ".02 / root 8 = .0071", 0.005, round(spread, 4),
              "GPT.init_weights")  # fmt: skip


def classification(hidden: Tensor) -> Iterator[Row]:
    """The trunk gives every token the state `hidden`; the head tells positive from negative."""

    class Trunk(GPT):
        def hidden(self, tokens: Tensor, *rest, **others) -> Tensor:
            return hidden.expand(*tokens.shape, -1)

    config = ClassifierConfig("classification", ("positive", "negative"), SpecialTokens(2, 3, 4), Columns("text"), 8)
    classifier = Classifier(Trunk(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=4)), config).eval()
    classifier.head.weight.data = torch.tensor([[0.15, 0.30, -0.25, 0.10], [-0.20, 0.10, 0.40, -0.15]])
    outcome = classifier(*make_batch([[[2, 0, 4]]], [0]))
    yield Row("logits of two classes", ".52 -.315", (0.52, -0.315), outcome.logits[0].tolist(), "Classifier")
    yield Row("their probabilities", ".697 .303", (0.697, 0.303), outcome.logits[0].softmax(0).tolist(), "Classifier")
    yield Row("loss of the first", ".361", 0.3604, outcome.task_loss.item(), "Classifier")
    pair = Example(("abcdefgh", "ijklmno"), None, "")  # one character for each word: 8 and 7
    tokenizer = CharTokenizer("abcdefghijklmno")
    (sequence,), _ = sequences_of(pair, "entailment", tokenizer, SpecialTokens.after(15), 512)
    yield Row("tokens of a pair of 8 and 7 words", "19", 18, len(sequence), "sequences_of")
    yield Row("where [extract] is, from 0", "18", 17, sequence.index(SpecialTokens.after(15).extract), "sequences_of")


def mixtures() -> Iterator[Row]:
    claim, dense = MixtureClaim(1.8e12, 220e9, 8, 2), MixtureClaim(1e12, 200e9, 8, 2)
    yield Row(
        "8 experts, 2 used, 1.8T: shared if 220B are active", "-", -306.7, claim.shared / 1e9, "MixtureClaim, in B"
    )
    yield Row("least that can be active", "220B", 450, claim.least_active / 1e9, "MixtureClaim, in B")
    yield Row(
        "the same of 1T, called equal to a dense 200B", "200B", 250, dense.least_active / 1e9, "MixtureClaim, in B"
    )
    mixtral = sketch("mixtral_8x7b")
    active, weights = mixtral.num_parameters(active=True), serving_memory(mixtral, 1)["weights"]
    yield Row("Mixtral 8x7B, parameters", "56B", 46_702_792_704, mixtral.num_parameters(), "GPT.num_parameters")
    yield Row("that a token uses", "14B", 12_879_925_248, active, "GPT.num_parameters")
    yield Row(
        "GB to serve it in 16 bits: all experts", f"{2 * active / 1e9:.1f}", 93.4, weights / 1e9, "serving_memory"
    )


def data() -> Iterator[Row]:
    names = ("common_crawl", "webtext2", "books1", "books2", "wikipedia")
    shares = mixture_shares([Source(name, weight) for name, weight in zip(names, (60.0, 22.0, 8.0, 8.0, 3.0))])
    yield Row("GPT-3's mixture, per cent, which sums to 101", "60 22 8 8 3", (59.4, 21.8, 7.9, 7.9, 3.0),
              [100 * share for share in shares], "mixture_shares")  # fmt: skip
    yield Row("tokens of 512 that BERT scores", "15%", 77, scored_tokens(0.15, 512), "scored_tokens")
    prompt = ["sea otter => loutre de mer", "cheese => fromage", "the cat sat on the mat =>"]
    answered = sum(not line.endswith("=>") for line in prompt)
    yield Row("demonstrations in a prompt called zero-shot", "0", 2, answered, "its lines")


def published() -> Iterator[Row]:
    """Differences of figures that the papers print."""
    yield Row("GPT-1 on Story Cloze, gain over the best before", "5.7", 8.9, 86.5 - 77.6, "GPT-1, table 3")
    yield Row("GPT-1 on RTE, listed as a win", "-", -5.7, 56.0 - 61.7, "GPT-1, table 2")
    yield Row("GPT-2 on CBT-NE, gain over the best before", "3.8", 6.8, 89.1 - 82.3, "GPT-2, table 3")


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "Sizes": sizes,
    "Losses": losses,
    "Attention by hand": attention,
    "A forward pass by hand": forward,
    "Mixtures of experts": mixtures,
    "Data and prompts": data,
    "Published results": published,
}


@torch.no_grad()
def main() -> int:
    parse_flags(Options, __doc__, sys.argv[1:])
    rows = []
    for title, section in SECTIONS.items():
        part = list(section())
        lines = [[row.what, row.stated, shown(row.right, row.right), row.by] for row in part]
        print(table([[title, "stated", "right", "by"], *lines]), end="\n\n")
        rows += part
    wrong = [row for row in rows if not row.holds]
    for row in wrong:
        print(f"{row.what}: {row.by} computes {shown(row.computed, row.right)}, not {shown(row.right, row.right)}")
    print(f"{len(rows) - len(wrong)} of {len(rows)} figures are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    entry_point(main)()
