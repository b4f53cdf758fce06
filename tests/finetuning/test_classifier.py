"""The classifier on a GPT: logits and losses against closed forms and slow implementations, and its directory."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.finetuning.classifier import (
    Batch,
    Classifier,
    ClassifierConfig,
    combined_loss,
    is_classifier,
    load_classifier,
    make_batch,
    save_classifier,
    with_special_tokens,
)
from gpt_arc.finetuning.examples import Columns, Example, SpecialTokens, sequences_of
from gpt_arc.finetuning.lora import add_adapters
from gpt_arc.finetuning.lstm import LSTM
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from gpt_arc.training.schedule import warmup_linear
from gpt_arc.weights.directory import load_model, save_model
from gpt_arc.weights.edit import transfer, with_settings
from helpers import randomised
from model import GPT, GPTConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz "
TOKENIZER = CharTokenizer(sorted(LETTERS))
SPECIAL = SpecialTokens.after(27)
GENERATIONS = {
    "gpt1": dict(norm_position="post", init="gpt1"),
    "gpt2": {},
    "gpt3": dict(attention_band=3),
    "modern": dict(
        positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tied_head=False, qk_norm=True, n_kv_head=1
    ),
    "untied": dict(
        positions="sinusoidal", tied_head=False, head_bias=True, activation="relu_squared", ngrams=3, ngram_rows=30
    ),
}
ARCHITECTURE = GPTConfig(block_size=24, vocab_size=30, n_layer=2, n_head=2, n_embd=16)


def config_of(task, classes=None, **settings):
    return ClassifierConfig(task, classes, SPECIAL, Columns.usual(task), 24, **settings)


def classifier_of(task, classes=None, generation="gpt2", seed=0, **settings):
    """A classifier in eval mode whose weights all affect the output."""
    trunk = GPT(dataclasses.replace(ARCHITECTURE, **GENERATIONS[generation]))
    return randomised(Classifier(trunk, config_of(task, classes, **settings)), seed)


def sequences(task, *texts):
    return sequences_of(Example(texts, None, ""), task, TOKENIZER, SPECIAL, 24)[0]


# ---- worked examples


class KnownStates(torch.nn.Module):
    """A trunk with given hidden states."""

    def __init__(self, hidden):
        super().__init__()
        self.states = hidden
        self.config = GPTConfig(block_size=hidden.size(1), vocab_size=30, n_layer=1, n_head=1, n_embd=hidden.size(2))

    def hidden(self, tokens, lengths, types):
        return self.states


def test_two_losses_combine_as_in_equation_5():
    assert combined_loss(-0.163, -3.018, 0.5) == pytest.approx(-1.672, abs=1e-12)
    losses = torch.tensor([2.0, 3.0], requires_grad=True)
    combined_loss(*losses, 0.25).backward()
    assert losses.grad.tolist() == [1.0, 0.25]


def test_the_worked_head_gives_its_published_probabilities_and_loss():
    states = torch.full((1, 4, 2), 9.0)
    states[0, 2] = torch.tensor([0.4, -0.5])  # of the third token, the last before padding
    classifier = Classifier(KnownStates(states), config_of("classification", ("positive", "negative"))).eval()
    with torch.no_grad():
        classifier.head.weight.copy_(torch.tensor([[0.8, -0.4], [-0.1, 0.55]]))
    outcome = classifier(torch.zeros(1, 1, 4, dtype=torch.int64), torch.tensor([[3]]), torch.tensor([0]), False)
    assert outcome.logits[0].tolist() == pytest.approx([0.52, -0.315])
    assert outcome.logits.softmax(1)[0].tolist() == pytest.approx([0.697, 0.303], abs=5e-4)
    assert outcome.task_loss.item() == pytest.approx(0.3604, abs=5e-5) and outcome.language_loss == 0


def test_a_zeroed_head_has_the_loss_of_a_uniform_guess():
    three = classifier_of("classification", ("a", "b", "c"))
    choice = classifier_of("multiple_choice")
    for classifier in (three, choice):
        torch.nn.init.zeros_(classifier.head.weight)
    examples = [sequences("classification", text) for text in ("abc", "de", "fghij")]
    outcome = three(*make_batch(examples, [0, 1, 2]))
    assert outcome.task_loss.item() == pytest.approx(3 * math.log(3), rel=1e-6)
    four, two = (sequences("multiple_choice", "abc", *options) for options in (("d", "e", "fg", "h"), ("ij", "k")))
    assert choice(*make_batch([four], [3])).task_loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert choice(*make_batch([four, two], [3, 1])).task_loss.item() == pytest.approx(math.log(8), rel=1e-6)
    assert choice(*make_batch([two], [0])).task_loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_loss_of_a_number_is_the_squared_error():
    classifier = classifier_of("classification")
    outcome = classifier(*make_batch([sequences("classification", text) for text in ("ab", "cde")], [0.5, -2.0]))
    assert outcome.logits.shape == (2, 1)
    (prediction_1, prediction_2) = outcome.logits[:, 0].tolist()
    assert outcome.task_loss.item() == pytest.approx((prediction_1 - 0.5) ** 2 + (prediction_2 + 2) ** 2, rel=1e-5)


def test_standardised_numbers_are_predicted_in_their_own_units():
    plain, scaled = classifier_of("classification"), classifier_of("classification", mean=50.0, scale=10.0)
    batch = make_batch([sequences("classification", text) for text in ("ab", "cde")], [45.0, 62.0])
    expected = 50 + 10 * plain(*batch).logits
    torch.testing.assert_close(scaled(*batch).logits, expected)
    errors = (expected[:, 0] - batch.labels).square().sum()
    torch.testing.assert_close(scaled(*batch).task_loss, errors)
    scaled.config = dataclasses.replace(scaled.config, dropout=0.0)
    torch.testing.assert_close(scaled.train()(*batch).task_loss, errors / 100)


def test_unknown_labels_add_no_loss():
    classifier = classifier_of("classification", ("a", "b"))
    examples = [sequences("classification", text) for text in ("ab", "cde")]
    loss = classifier(*make_batch(examples, [1, -1])).task_loss
    assert loss.item() == pytest.approx(classifier(*make_batch(examples[:1], [1])).task_loss.item(), rel=1e-5)


# ---- what the head reads


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_head_reads_the_state_of_the_last_token(generation):
    classifier = classifier_of("classification", ("a", "b"), generation)
    examples = [sequences("classification", text) for text in ("abcdefg", "hi", "")]
    batch = make_batch(examples, [0, 0, 0])
    logits = classifier(*batch).logits
    for example, row in zip(examples, logits):
        (sequence,) = example
        assert sequence[-1] == SPECIAL.extract
        state = classifier.trunk.hidden(torch.tensor([sequence]))[0, len(sequence) - 1]
        torch.testing.assert_close(row, classifier.head.weight @ state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [("a", "b", "c"), None])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_similarity_is_symmetric(generation, classes):
    classifier = classifier_of("similarity", classes, generation)
    pairs = [
        ("abc de", "xyz"),
        ("q", "long enough text"),
        ("the first of two", "the second of both"),
    ]
    batches = [make_batch([sequences("similarity", *pair[::step]) for pair in pairs], [0] * 3) for step in (1, -1)]
    forward, backward = (classifier(*batch).logits for batch in batches)
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-6 * forward.abs().max().item())
    orders = [sequences("similarity", *pair) for pair in pairs]
    states = [[classifier.trunk.hidden(torch.tensor([order]))[0, -1] for order in example] for example in orders]
    for row, (state_1, state_2) in zip(forward, states):
        torch.testing.assert_close(row, classifier.head.weight @ (state_1 + state_2), rtol=1e-4, atol=1e-5)
        assert (state_1 - state_2).abs().max() > 0.01


def test_missing_options_have_probability_0():
    classifier = classifier_of("multiple_choice")
    four, two = (sequences("multiple_choice", "abc", *options) for options in (("d", "e", "fg", "h"), ("ij", "k")))
    logits = classifier(*make_batch([two, four], [0, 0])).logits
    assert logits.shape == (2, 4) and torch.isneginf(logits[0, 2:]).all() and logits[1].isfinite().all()
    assert logits[0].softmax(0)[2:].tolist() == [0, 0]
    for option, sequence in enumerate(four):
        state = classifier.trunk.hidden(torch.tensor([sequence]))[0, -1]
        torch.testing.assert_close(logits[1, option], classifier.head.weight[0] @ state, rtol=1e-4, atol=1e-5)


def test_all_options_share_a_dropout_mask():
    classifier = classifier_of("multiple_choice", dropout=0.5).train()
    torch.nn.init.ones_(classifier.head.weight)
    batch = make_batch([sequences("multiple_choice", "abc", "de", "de")], [0])
    torch.manual_seed(1)
    drawn = torch.stack([classifier(*batch).logits[0] for _ in range(20)])
    assert torch.allclose(drawn[:, 0], drawn[:, 1], atol=1e-5) and drawn[:, 0].std() > 0.1
    classifier.eval()
    assert torch.equal(classifier(*batch).logits, classifier(*batch).logits)


# ---- padding

TASKS = {
    "classification": (("a", "b", "c"), [("ab",), ("a longer text here",), ("",), ("cde",)], [0, 2, 1, 1]),
    "entailment": (("no", "yes"), [("ab", "cd"), ("a longer text", "here"), ("a", "b")], [0, 1, 1]),
    "similarity": (None, [("ab", "cd"), ("a longer text", "here"), ("a", "b")], [0.5, -1.0, 2.0]),
    "multiple_choice": (None, [("ab", "c", "d"), ("a longer text", "a", "bcd", "c", "e"), ("a", "b", "c")], [1, 3, 0]),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("generation", ["gpt1", "gpt3", "modern", "untied", "lstm"])
def test_padding_changes_no_logits_losses_or_gradients(task, generation):
    classes, texts, labels = TASKS[task]
    classifier = classifier_of(task, classes, "gpt1" if generation == "lstm" else generation)
    if generation == "lstm":
        classifier = randomised(Classifier(LSTM(classifier.trunk.config), classifier.config))
    classifier = classifier.double()  # so the order of sums doesn't matter
    examples = [sequences(task, *each) for each in texts]

    def outcome(batch):
        classifier.zero_grad()
        actual = classifier(*batch)
        combined_loss(actual.task_loss, actual.language_loss, 0.5).backward()
        return actual, [p.grad.clone() for p in classifier.parameters()]

    together = make_batch(examples, labels)
    present = torch.arange(together.tokens.size(2)) < together.lengths[..., None]
    noise = torch.randint(0, 30, together.tokens.shape, generator=torch.Generator().manual_seed(3))
    noisy = Batch(torch.where(present, together.tokens, noise), together.lengths, together.labels)
    (actual, gradients), (noisy_outcome, noisy_gradients) = outcome(together), outcome(noisy)
    torch.testing.assert_close(actual, noisy_outcome, rtol=1e-9, atol=1e-9)
    singles = [outcome(make_batch([example], [label])) for example, label in zip(examples, labels)]
    for row, (single, _) in zip(actual.logits, singles):
        torch.testing.assert_close(row[: single.logits.size(1)], single.logits[0], rtol=1e-6, atol=1e-6)
    for loss in (1, 2):
        expected = sum(single[loss] for single, _ in singles)
        torch.testing.assert_close(actual[loss], expected, rtol=1e-9, atol=1e-9)
    bound = 1e-6 * max(gradient.abs().max().item() for gradient in gradients)
    for i, (gradient, noised) in enumerate(zip(gradients, noisy_gradients)):
        expected = sum(each[i] for _, each in singles)
        assert (gradient - expected).abs().max() <= bound and (gradient - noised).abs().max() <= bound


# ---- the language-model loss


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("generation", ["gpt1", "untied"])
def test_the_language_loss_is_a_mean_over_tokens_and_sequences_summed_over_examples(task, generation):
    classes, texts, labels = TASKS[task]
    classifier = classifier_of(task, classes, generation)
    examples = [sequences(task, *each) for each in texts]
    expected = 0.0
    for example in examples:
        means = []
        for sequence in example:
            logits = classifier.trunk(torch.tensor([sequence[:-1]]))[0]
            means.append(F.cross_entropy(logits, torch.tensor(sequence[1:])).item())  # with delimiter and extract
        expected += sum(means) / len(means)
    batch = make_batch(examples, labels)
    assert classifier(*batch).language_loss.item() == pytest.approx(expected, rel=1e-5)
    assert classifier(*batch, with_language=False).language_loss == 0


def test_targets_are_the_next_tokens_including_special_ones():
    example = sequences("entailment", "a", "bc")
    batch = make_batch([example, sequences("entailment", "", "")], [0, 0])
    targets, weights = Classifier.language_targets(batch.tokens, batch.lengths)
    assert targets.tolist() == [[*example[0][1:], -1], [SPECIAL.delimiter, SPECIAL.extract, -1, -1, -1, -1]]
    torch.testing.assert_close(weights, torch.tensor([[0.2] * 5 + [0], [0.5] * 2 + [0] * 4]))


# ---- updates


def test_the_first_updates_equal_the_published_formula():
    """Ten updates of head and trunk by AdamW with clipping and the schedule, against numpy in float64."""
    total, rate, warmup = 50, 6.25e-5, 0.1
    settings = dict(learning_rate=rate, weight_decay=0.01, beta1=0.9, beta2=0.999, adam_eps=1e-8, grad_clip=1.0)
    torch.manual_seed(0)
    trunk = GPT(dataclasses.replace(ARCHITECTURE, n_layer=1, norm_position="post", init="gpt1"))
    classifier = Classifier(trunk, config_of("classification", ("a", "b"), dropout=0.0)).double()
    config = TrainingConfig(max_iters=total, **settings)
    updater = Updater(classifier, config, torch.device("cpu"), "float32")
    names = dict(classifier.named_parameters())
    expected = {name: p.detach().numpy().copy() for name, p in names.items()}
    mean = {name: np.zeros_like(p) for name, p in expected.items()}
    variance = {name: np.zeros_like(p) for name, p in expected.items()}
    start = {name: p.copy() for name, p in expected.items()}
    batch, clipped = make_batch([sequences("classification", text) for text in ("abc", "de f", "gh")], [0, 1, 0]), 0
    for t in range(1, 11):
        outcome = classifier(*batch)
        updater.backward(combined_loss(outcome.task_loss, outcome.language_loss, 0.5) / 3)
        gradients = {name: p.grad.numpy().copy() for name, p in names.items()}
        norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        clipped += norm > 1
        progress = (t - 1) / total  # of the updates made so far
        updater.update(rate * warmup_linear(progress, warmup), outcome.task_loss.detach())
        now = rate * (progress / warmup if progress <= warmup else 1) * (1 - progress)
        for name, gradient in gradients.items():
            gradient = gradient / max(norm, 1.0)
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            variance[name] = 0.999 * variance[name] + 0.001 * gradient**2
            step = (mean[name] / (1 - 0.9**t)) / (np.sqrt(variance[name] / (1 - 0.999**t)) + 1e-8)
            decay = 0.01 if gradient.ndim > 1 else 0.0
            expected[name] = expected[name] - now * (step + decay * expected[name])
    assert clipped
    for name, p in names.items():
        moved, should = p.detach().numpy() - start[name], expected[name] - start[name]
        assert np.abs(should).max() > 1e-5, name
        assert np.abs(moved - should).max() <= 1e-6 * np.abs(should).max(), name


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    for warmup in (0.002, 0.1):
        values = [warmup_linear(x, warmup) for x in (0, warmup / 2, warmup, 0.5, 1)]
        assert values == pytest.approx([0, (1 - warmup / 2) / 2, 1 - warmup, 0.5, 0], abs=1e-12)


# ---- new weights


@pytest.mark.parametrize("generation", GENERATIONS)
def test_special_tokens_leave_existing_weights_unchanged(generation):
    config = dataclasses.replace(ARCHITECTURE, vocab_size=400, n_embd=64, **GENERATIONS[generation])
    model = randomised(GPT(config))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    larger, special = with_special_tokens(model)
    assert special == (400, 401, 402) and larger.config == dataclasses.replace(config, vocab_size=403)
    torch.manual_seed(5)
    grown = ["token_embedding.weight"] + ["head.weight"] * (not config.tied_head)
    for name, tensor in larger.state_dict().items():
        rows = len(before[name])
        assert torch.equal(tensor[:rows], before[name]), name
        if name == "head_bias":
            assert tensor[rows:].tolist() == [0, 0, 0]
        elif name in grown:
            assert torch.equal(tensor[rows:], 0.02 * torch.randn(3, 64))  # the same in every process with this seed
            assert tensor[rows:].std().item() == pytest.approx(0.02, rel=0.25)
        else:
            assert len(tensor) == rows
    tokens = torch.randint(0, 400, (2, 9))
    torch.testing.assert_close(larger.eval()(tokens)[..., :400], model(tokens), rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in larger.parameters())


def differing(model, reference):
    """Names of tensors that differ, except biases and norms, which are initialised to constants."""
    expected = reference.state_dict()
    return {
        name for name, tensor in model.state_dict().items() if tensor.dim() > 1 and (tensor != expected[name]).any()
    }


@pytest.mark.parametrize("generation", ["gpt1", "untied"])
def test_transfer_keeps_the_first_blocks_and_the_embeddings(generation):
    model = randomised(GPT(dataclasses.replace(ARCHITECTURE, n_layer=3, **GENERATIONS[generation])))
    matrices = {name for name, tensor in model.state_dict().items() if tensor.dim() > 1}
    embeddings = {name for name in matrices if "embedding" in name}
    for blocks in range(3):
        transferred = embeddings | {name for name in matrices for i in range(blocks) if name.startswith(f"blocks.{i}.")}
        partly = transfer(model, blocks)
        assert differing(model, partly) == matrices - transferred
        fresh = torch.cat([t.flatten() for name, t in partly.state_dict().items() if name in matrices - transferred])
        assert fresh.std() < 0.03  # the model's weights have .3
    assert transfer(model, 3) is model
    assert differing(model, transfer(model, None)) == matrices
    assert partly.config == model.config


def test_transfer_keeps_the_blocks_norms_but_not_the_final_norm():
    model = randomised(GPT(dataclasses.replace(ARCHITECTURE, head_bias=True)))
    partly = transfer(model, 1)
    assert torch.equal(partly.blocks[0].mlp_norm.bias, model.blocks[0].mlp_norm.bias)
    for vector in (partly.blocks[1].mlp_norm.bias, partly.final_norm.bias, partly.head_bias):
        assert not vector.any()


def test_settings_change_without_changing_weights():
    model = randomised(GPT(ARCHITECTURE))
    changed = with_settings(model, dropout=0.3)
    assert changed.config == dataclasses.replace(ARCHITECTURE, dropout=0.3) and changed.blocks[0].mlp.dropout.p == 0.3
    assert not differing(model, changed)
    recurrent = with_settings(LSTM(ARCHITECTURE), dropout=0.3)
    assert isinstance(recurrent, LSTM) and recurrent.dropout.p == 0.3


# ---- directories


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("generation", ["gpt1", "modern", "lstm"])
def test_a_saved_classifier_computes_the_same(tmp_path, task, generation):
    classes, texts, labels = TASKS[task]
    classifier = classifier_of(task, classes, "gpt1" if generation == "lstm" else generation)
    columns = Columns("x", "y", ("1", "2"), "z")
    config = dataclasses.replace(classifier.config, columns=columns, max_tokens=20, mean=2.5, scale=3.0)
    trunk = classifier.trunk
    if generation == "lstm":
        config = dataclasses.replace(config, lstm=True)
        trunk = LSTM(trunk.config)
    classifier = randomised(Classifier(trunk, config))
    assert not is_classifier(tmp_path)
    save_classifier(classifier, TOKENIZER, tmp_path)
    assert is_classifier(tmp_path)
    loaded, tokenizer = load_classifier(tmp_path)
    assert loaded.config == config and tokenizer == TOKENIZER and loaded.training and loaded.trunk.training
    batch = make_batch([sequences(task, *each) for each in texts], labels)
    for actual, expected in zip(loaded.eval()(*batch), classifier(*batch)):
        assert torch.equal(actual, expected)
    assert load_classifier(tmp_path, torch.bfloat16)[0].head.weight.dtype == torch.bfloat16


def test_a_classifier_s_directory_loads_as_a_language_model(tmp_path):
    trunk, special = with_special_tokens(randomised(GPT(dataclasses.replace(ARCHITECTURE, vocab_size=27))))
    save_classifier(Classifier(trunk, config_of("classification", ("a", "b"))), TOKENIZER, tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert model.config.vocab_size == 30 and tokenizer.vocab_size == 27 and special == SPECIAL
    assert not differing(model, trunk)


@pytest.mark.parametrize("generation", ["gpt1", "modern"])
def test_saving_merges_adapters_in_the_file_only(tmp_path, generation):
    classifier = classifier_of("classification", ("a", "b"), generation)
    base = {name: tensor.clone() for name, tensor in classifier.trunk.state_dict().items()}
    add_adapters(classifier.trunk.blocks, 3, 6.0)
    randomised(classifier.trunk.blocks, 1)
    for name, parameter in classifier.trunk.blocks.named_parameters():
        if "up" not in name.split(".")[-1] and "down" not in name.split(".")[-1]:
            parameter.data.copy_(base["blocks." + name.replace(".linear", "")])
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    batch = make_batch([sequences("classification", text) for text in ("abc", "de f")], [0, 1])
    outcome = classifier(*batch)
    save_classifier(classifier, TOKENIZER, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    learning = {name for name, parameter in classifier.trunk.named_parameters() if parameter.requires_grad}
    assert any(name.endswith("attention.qkv.up") for name in learning)
    loaded, _ = load_classifier(tmp_path)
    assert loaded.trunk.state_dict().keys() == base.keys()
    assert (loaded.trunk.blocks[0].mlp.up.weight - base["blocks.0.mlp.up.weight"]).abs().max() > 0.1
    torch.testing.assert_close(tuple(loaded.eval()(*batch)), tuple(outcome), rtol=1e-4, atol=1e-4)


@pytest.fixture
def directory(tmp_path):
    save_classifier(classifier_of("classification", ("a", "b")), TOKENIZER, tmp_path)
    return tmp_path


@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("name", ["classifier.json", "classifier.safetensors", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_missing_or_damaged_file_is_named(directory, name, damage, lstm):
    if lstm:
        classifier = Classifier(LSTM(ARCHITECTURE), config_of("classification", ("a", "b"), lstm=True))
        save_classifier(classifier, TOKENIZER, directory)
    path = directory / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as refused:
        load_classifier(directory)
    message = str(refused.value)
    if damage == "missing":
        descriptions = {"classifier.json": "without a classifier's head", "tokenizer.json": "tokenizer"}
        assert str(directory) in message and descriptions.get(name, name) in message
    else:
        assert str(path) in message and "\n" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2; this program reads version 1"),
        ({"special": {"start": 1}}, "is damaged: it lacks special.delimiter"),
        ({"surprise": 1}, "is damaged: it has the unknown key surprise"),
        ({"columns": None}, "is damaged: columns = null"),
        ({"classes": ["a", "b", "c"]}, r"classifier.safetensors: head.weight has the shape"),
    ],
)
def test_a_mismatched_configuration_is_refused(directory, change, message):
    path = directory / "classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match=message):
        load_classifier(directory)


def test_a_model_without_a_head_is_not_a_classifier(tmp_path):
    save_model(GPT(ARCHITECTURE), TOKENIZER, tmp_path)
    assert not is_classifier(tmp_path) and not is_classifier("gpt2")
    with pytest.raises(UserError, match="is a model without a classifier's head: train one with --train FILE"):
        load_classifier(tmp_path)
