"""The use of experts against a token-by-token count, routers with known choices, and entropies by hand."""

import json
import math
import sys
from collections import Counter

import pytest
import torch

import moe_report
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.evaluation.expert_use import CLASSES, expert_use, token_class, token_classes, watched, windows
from gpt_arc.weights.directory import save_model
from helpers import ROOT, TEXT, randomised
from model import GPT, GPTConfig
from tools import expert_use as tool

TINY = dict(block_size=12, n_layer=3, n_head=2, n_embd=16, mlp_size=8, n_experts=4, dropout=0.3)
PROSE = "ROMEO:\nO, she doth teach 24 torches to burn bright!\n\nIt's  so.\n"


@pytest.fixture
def run(output_of):
    return lambda *argv: output_of(entry_point(tool.main), "tools/expert_use.py", *map(str, argv))


def read_all(tokenizer, text, size, most=0):
    tokens = tokenizer.encode(text)
    return windows(tokenizer, lambda start, count: tokens[start : start + count], len(tokens), size, most)


def use_of(model, tokenizer, text, **settings):
    """Returns the use over all windows; the last, which may be short, comes first."""
    return expert_use(model.eval(), read_all(tokenizer, text, model.config.block_size)[::-1], **settings)


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        ("\n", "a", "newline"),
        (" \n\n", ".", "newline"),
        ("  ", "a", "space"),
        ("\t", "", "space"),
        ("R", "", "capital"),
        ("R", "O", "capital"),
        (" The", "a", "capital"),
        ("t", "", "word begins"),
        ("t", " ", "word begins"),
        ("t", "'", "word begins"),
        ("t", "a", "in a word"),
        ("ing", "burn", "in a word"),
        (" the", "a", "word begins"),
        ("\nthe", "a", "word begins"),
        ("é", "caf", "in a word"),
        ("漢", "a ", "word begins"),
        ("7", "a", "digit"),
        (" 1616", "in", "digit"),
        (",", "a", "punctuation"),
        (" (", "a", "punctuation"),
        ("'t", "don", "punctuation"),
        ("$", "", "punctuation"),
        ("", "a", "other"),
        ("\N{REPLACEMENT CHARACTER}", "a", "other"),
    ],
)
def test_token_classes_by_text(text, before, expected):
    assert token_class(text, before) == expected


@pytest.mark.parametrize("kind", ["characters", "BPE"])
def test_classes_of_a_text(kind):
    """The expected classes follow from each token's position in the text."""
    tokenizer = CharTokenizer.from_text(PROSE) if kind == "characters" else BPETokenizer.train([PROSE] * 9, 290)
    tokens = tokenizer.encode(PROSE)
    expected, start = [], 0
    for token in tokens:
        piece = tokenizer.decode([token])
        assert PROSE.startswith(piece, start)
        place = start + len(piece) - len(piece.lstrip())
        if piece.isspace():
            expected.append("newline" if "\n" in piece else "space")
        elif PROSE[place] in "ROMEI":
            expected.append("capital")
        elif PROSE[place] in "24":
            expected.append("digit")
        elif PROSE[place] in ":,!'.":
            expected.append("punctuation")
        else:
            expected.append("word begins" if place == 0 or PROSE[place - 1] in "\n '" else "in a word")
        start += len(piece)
    assert [CLASSES[i] for i in token_classes(tokenizer, tokens)] == expected
    assert set(expected) == {*CLASSES} - {"other"}


def test_parts_of_characters_and_end_of_text_are_other():
    tokenizer = BPETokenizer.train(["abc"], 300)
    tokens = [*tokenizer.encode("a"), tokenizer.end_of_text, *tokenizer.encode("bé")]
    assert len(tokens) == 5
    classes = [CLASSES[i] for i in token_classes(tokenizer, tokens)]
    assert classes == ["word begins", "other", "word begins", "other", "other"]


def test_a_space_that_only_shows_after_another_token_begins_a_word():
    """SentencePiece tokenizers drop the space at the start of a text."""

    class Spaceless(CharTokenizer):
        def decode(self, tokens):
            return "".join([" c", "at", " sat", "."][token] for token in tokens).removeprefix(" ")

    classes = [CLASSES[i] for i in token_classes(Spaceless("abcd"), [0, 1, 2, 1, 0, 3, 2])]
    begins, inside = "word begins", "in a word"
    assert classes == [begins, inside, begins, inside, begins, "punctuation", begins]


def test_windows_are_spread_over_the_text():
    tokenizer = CharTokenizer.from_text(TEXT)
    whole = token_classes(tokenizer, tokenizer.encode(TEXT))
    every = read_all(tokenizer, TEXT, 7)
    assert [c for window in every for c in window.classes] == whole
    assert [t for window in every for t in window.tokens] == tokenizer.encode(TEXT)
    some = read_all(tokenizer, TEXT, 7, 70)
    assert len(some) == 10 and all(window in every for window in some)
    places = [every.index(window) for window in some]
    assert places[0] == 0 and places[-1] >= len(every) * 0.89
    assert len(read_all(tokenizer, TEXT, 7, 3)) == 1  # at least one window
    assert [len(w.tokens) for w in read_all(tokenizer, TEXT[:20], 7, 500)] == [7, 7, 6]


@pytest.mark.parametrize("settings", [{}, {"experts_per_token": 1, "balance_rate": 0.1}, {"expert_interval": 2}])
def test_counts_equal_a_token_by_token_count(settings):
    tokenizer = CharTokenizer.from_text(PROSE)
    model = randomised(GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **(TINY | settings))))
    for experts in model.experts:
        if settings.get("balance_rate"):
            experts.balance += torch.tensor([0.3, 0.0, -0.2, 0.1])
    tokens = tokenizer.encode(PROSE)
    classes = token_classes(tokenizer, tokens)
    blocks = [i for i in range(3) if model.config.has_experts(i)]
    by_class, by_token = ([Counter() for _ in blocks] for _ in range(2))
    entropies = [[] for _ in blocks]
    inputs = {}
    hooks = [
        model.blocks[b].mlp.register_forward_pre_hook(lambda _, args, b=b: inputs.update({b: args[0]})) for b in blocks
    ]
    for place, token in enumerate(tokens):
        with torch.no_grad():
            model(torch.tensor([tokens[place - place % 12 : place + 1]]))
        for i, block in enumerate(blocks):
            experts = model.blocks[block].mlp
            logits = [math.fsum(w * x for w, x in zip(row, inputs[block][0, -1].tolist()))
                      for row in experts.router.weight.tolist()]  # fmt: skip
            total = math.fsum(math.exp(l) for l in logits)
            gates = [math.exp(l) / total for l in logits]
            entropies[i].append(-math.fsum(p * math.log(p) for p in gates))
            bias = experts.balance.tolist() if settings.get("balance_rate") else [0.0] * 4
            best = sorted(range(4), key=lambda e: -gates[e] - bias[e])[: model.config.experts_per_token]
            for expert in best:
                by_class[i][classes[place], expert] += 1
                by_token[i][token, expert] += 1
    for hook in hooks:
        hook.remove()
    for batch_tokens in (8192, 24, 1):
        uses = use_of(model, tokenizer, PROSE, batch_tokens=batch_tokens)
        assert [use.block for use in uses] == [b + 1 for b in blocks]
        for use, kinds, ids, nats in zip(uses, by_class, by_token, entropies):
            for counts, expected in ((use.by_class, kinds), (use.by_token, ids)):
                assert {(g, e): n for g, row in enumerate(counts.tolist()) for e, n in enumerate(row) if n} == expected
            assert use.router_entropy == pytest.approx(sum(nats) / len(nats), abs=1e-5)
            loads = [sum(n for (_, e), n in kinds.items() if e == expert) for expert in range(4)]
            mean = sum(loads) / 4
            assert use.cv == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in loads) / 4) / mean)
            assert use.max_over_mean == pytest.approx(max(loads) / mean)


def sorting_model(characters: str, logits: dict[str, list[float]], per_token: int = 1) -> tuple[GPT, CharTokenizer]:
    """Returns a mixture whose router gives each character these logits, up to a positive factor, at every position."""
    tokenizer = CharTokenizer(characters)
    size, experts = len(characters), len(next(iter(logits.values())))
    config = GPTConfig(
        8, size, 2, 1, 16, norm="rmsnorm", positions="rotary", bias=False, mlp_size=4, n_experts=experts,
        experts_per_token=per_token,
    )  # fmt: skip
    model = GPT(config)
    with torch.no_grad():
        model.token_embedding.weight.copy_(torch.eye(size, 16))
        for block in model.blocks:
            block.attention.projection.weight.zero_()
            block.mlp.projection.zero_()
            block.mlp.router.weight.zero_()
            block.mlp.router.weight[:, :size] = torch.tensor([logits[c] for c in characters]).T
    return model, tokenizer


def entropy_of(counts) -> float:
    return -math.fsum(n / sum(counts) * math.log(n / sum(counts)) for n in counts)


MARKS = "A1.\n "  # a character of each class that doesn't depend on context
MARKED = "A1 . A\n111. AA A\n  .1A  "


def test_a_router_by_class_has_the_classes_entropy():
    one_each = {c: [5.0 * (e == (i + 2) % 5) for e in range(5)] for i, c in enumerate(MARKS)}
    for use in use_of(*sorting_model(MARKS, one_each), MARKED):
        assert use.mutual_information == pytest.approx(entropy_of(Counter(MARKED).values()))
        assert use.explained == pytest.approx(1)
        assert [use.typical(e, 4) for e in (2, 3, 1)] == [[(i, MARKED.count(MARKS[i]))] for i in (0, 1, 4)]
    pairs = {c: [2.0 * (e == i) + (e == (i + 1) % 5) for e in range(5)] for i, c in enumerate(MARKS)}
    counts = Counter(MARKED)
    loads = [counts[MARKS[e]] + counts[MARKS[e - 1]] for e in range(5)]
    for use in use_of(*sorting_model(MARKS, pairs, per_token=2), MARKED):
        assert use.mutual_information == pytest.approx(entropy_of(loads) - math.log(2))
        assert use.explained == pytest.approx(1)


def test_a_router_independent_of_class_has_no_mutual_information():
    halves = {"A": [1.0, 0.0], "B": [0.0, 1.0], "1": [1.0, 0.0], "2": [0.0, 1.0]}
    for use in use_of(*sorting_model("AB12", halves), "AB1221BAAB11AB22"):
        assert use.mutual_information == pytest.approx(0, abs=1e-12) and use.explained == pytest.approx(0, abs=1e-12)
        assert use.cv == 0 and use.load.tolist() == [0.5, 0.5]


def test_a_collapsed_router_leaves_nothing_to_explain():
    collapsed = {c: [3.0, 0.0, 2.0, -1.0] for c in MARKS}
    for use in use_of(*sorting_model(MARKS, collapsed, per_token=2), MARKED):
        assert use.explained is None and use.mutual_information == pytest.approx(0, abs=1e-12)
        assert use.load.tolist() == [0.5, 0, 0.5, 0] and use.cv == 1 and use.max_over_mean == 2
        assert use.typical(0, 3) == []  # no token exceeds the share


def test_uniform_probabilities_have_the_largest_entropy():
    for use in use_of(*sorting_model(MARKS, {c: [0.0] * 4 for c in MARKS}), MARKED):
        assert use.router_entropy == pytest.approx(math.log(4))


def test_watching_restores_the_model():
    model = randomised(GPT(GPTConfig(vocab_size=9, **TINY)))
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        before = model(tokens)
        with pytest.raises(KeyError), watched(model) as records:
            assert torch.equal(model(tokens), before)
            raise KeyError
        assert [len(record) for record in records] == [1, 1, 1]
        model(tokens)
    assert [len(record) for record in records] == [1, 1, 1]
    assert not any("route" in vars(experts) for experts in model.experts)


def save_mixture(path, text=TEXT, **settings):
    tokenizer = CharTokenizer.from_text(text)
    model = randomised(GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **(TINY | settings))))
    save_model(model, tokenizer, path)
    return model, tokenizer


def test_the_command_line(run, workplace):
    model, tokenizer = save_mixture(workplace / "mixture")
    flags = "--dataset", "sums", "--tokens", "0", "--top", "2", "--json", "use.json", "--plot", "use.png"
    output = run("mixture", *flags)
    val = TEXT[len(TEXT) * 9 // 10 :]
    uses = use_of(model, tokenizer, val)
    for use in uses:
        figures_line = f"block {use.block}: CV {use.cv:.3f}, max/mean {use.max_over_mean:.2f}, router entropy"
        assert f"{figures_line} {use.router_entropy:.3f}" in output
        assert f"{use.mutual_information:.3f} nats, {use.explained:.1%} of what could be" in output
        for number in range(1, 5):
            best = [f"{tokenizer.decode([token])!r} {times:,}" for token, times in use.typical(number - 1, 2)]
            assert f"\nexpert {number}: {', '.join(best) or 'none beyond its share'}\n" in output + "\n"
    header, load, *rows = output.splitlines()[1:8]
    assert header.split() == ["tokens", *"expert 1 expert 2 expert 3 expert 4".split()]
    assert load.split()[:3] == ["load,", "%", f"{len(val):,}"]
    assert [float(x) for x in load.split()[3:]] == [round(100 * x, 1) for x in uses[0].load.tolist()]
    assert rows[0].split()[:2] == ["newline", str(val.count("\n"))]
    shares = (uses[0].by_class[0] / uses[0].by_class[0].sum()).tolist()
    assert [float(x) for x in rows[0].split()[2:]] == pytest.approx([100 * x for x in shares], abs=0.051)
    content = json.loads((workplace / "use.json").read_text())
    assert content["checkpoint"] == str(workplace / "mixture")
    assert [list(block["choices"].values()) for block in content["blocks"]] == [u.by_class.tolist() for u in uses]
    assert [block["cv"] for block in content["blocks"]] == [u.cv for u in uses]
    assert (workplace / "use.png").read_bytes().startswith(b"\x89PNG")
    (workplace / "val.txt").write_text(val)
    assert output.startswith(run("mixture", "--text", "val.txt", "--tokens=0").split("\n\n")[0])
    assert f"{max(1, 50 // 12) * 12} " in run("mixture", "--text", "val.txt", "--tokens=50")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "name what to read, either --text FILE or --dataset NAME"),
        (["--text=a.txt", "--dataset=sums"], "name what to read, either"),
        (["--dataset=sums", "--tokens=-1"], "tokens = -1 must be at least 0"),
        (["--dataset=sums", "--batch_tokens=0"], "batch_tokens = 0 must be at least 1"),
        (["--dataset=sums", "--plot=use.jpg"], "use.jpg must end in .png"),
        (["--dataset=sums", "--plot=no/use.png"], "there is no folder no for the results"),
        (["--dataset=sums", "--json=no/use.json"], "there is no folder no for the results"),
        (["--dataset=sums", "--split=test"], "--split"),
        (["--dataset=sum"], "there is no prepared dataset sum, neither below data/"),
        (["--dataset=other"], "other was prepared with another tokenizer than the model's"),
        (["--text=none.txt"], "none.txt"),
        (["--text=empty.txt"], "empty.txt is empty"),
        (["--text=strange.txt"], "the character '§'"),
        (["--datset=sums"], "there is no flag --datset; did you mean --dataset"),
    ],
)
def test_unreadable_input_is_refused(flags, sentence, run, workplace):
    save_mixture(workplace / "mixture")
    (workplace / "data" / "other").mkdir()
    for path in (workplace / "data" / "sums").iterdir():
        (workplace / "data" / "other" / path.name).write_bytes(path.read_bytes())
    CharTokenizer.from_text("abc").save(workplace / "data" / "other")
    (workplace / "data" / "other" / "meta.json").unlink()  # it has the number of tokens
    (workplace / "empty.txt").write_text("")
    (workplace / "strange.txt").write_text("§")
    assert sentence in run("mixture", *flags)


def test_a_model_without_experts_or_tokenizer_is_refused(run, workplace, monkeypatch):
    save_mixture(workplace / "dense", n_experts=0)
    assert "dense is a dense model: it has no experts" in run("dense", "--dataset=sums")
    model, _ = save_mixture(workplace / "mixture")
    save_model(model, None, workplace / "bare")
    assert "bare has no tokenizer" in run("bare", "--dataset=sums")
    assert "there is no model directory" in run("nowhere", "--dataset=sums")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert f"pip install -e '{ROOT}[plot]'" in run("mixture", "--dataset=sums", "--plot=use.png")


def test_the_report_compares_seed_by_seed(tmp_path, output_of):
    losses = {"mixture": (1.5, 1.7), "dense": (1.6, 1.9), "without_losses": (1.55, 1.8)}
    for variant, values in losses.items():
        for seed, lowest in enumerate(values, start=1):
            folder = tmp_path / variant / str(seed)
            folder.mkdir(parents=True)
            lines = [{"step": 0, "val_loss": 4.0}, {"step": 50, "val_loss": lowest}]
            for step in (70, 95, 100):
                routers = {"expert_cv": step / 100, "expert_max": 2.0 * seed, "router_entropy": 1.0}
                lines.append({"step": step, "train_loss": 1.0} | ({} if variant == "dense" else routers))
            lines[-1]["val_loss"] = lowest + 0.2  # over-fitted; the lowest loss counts
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    unfinished = tmp_path / "mixture" / "3"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").write_text('{"step": 50, "val_loss": 0.1}\n')
    for seed, cv in ((1, 0.2), (2, 0.4)):
        blocks = [{"cv": cv - 0.1}, {"cv": cv + 0.1}]
        (tmp_path / "mixture" / str(seed) / "use.json").write_text(json.dumps({"blocks": blocks}))
    report = entry_point(moe_report.main)
    output = output_of(report, "moe_report.py", f"--results={tmp_path}")
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in output.splitlines()}
    # differences .1 and .2: mean .15, standard error .0707 / sqrt 2; CV of the lines after update 90
    assert rows["mixture, 2 of 8 experts"] == [
        "1.5000", "1.7000", "+0.1500 ± 0.0500", "0.975", "3.000", "1.000", "0.300",
    ]  # fmt: skip
    assert rows["mixture without its losses"][2] == "+0.0750 ± 0.0250"
    assert rows["dense, equal cost"][:2] == ["1.6000", "1.9000"]
    assert (tmp_path / "table.md").read_text() == output
    assert (tmp_path / "training.png").stat().st_size > 1000
    assert "has no runs: " in output_of(report, "moe_report.py", f"--results={tmp_path / 'nothing'}")


def test_the_arc_compares_equal_active_parameters():
    """The dense model has as many parameters as a token of the mixture uses, except the routers."""
    import tomllib

    settings = tomllib.loads((ROOT / "configs" / "moe_mini.toml").read_text())["model"]
    mixture = GPT(GPTConfig(**settings))
    assert "dense) changed=(--n_experts=0 --mlp_size=256)" in (ROOT / "examples" / "moe_arc.sh").read_text()
    dense = GPT(GPTConfig(**(settings | {"n_experts": 0, "mlp_size": 256})))
    routers = sum(experts.router.weight.numel() for experts in mixture.experts)
    assert mixture.num_parameters(active=True) == dense.num_parameters() + routers
