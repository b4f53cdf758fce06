"""The numpy GPT against the torch model, values and gradients, and the results of its training."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import numpy_gpt
from helpers import ROOT, command, randomised
from model import GPT, GPTConfig

SETTINGS = dict(norm_position="post", init="gpt1", activation="gelu_tanh", norm_eps=numpy_gpt.NORM_EPS)
SIZES = dict(n_layer=numpy_gpt.N_LAYER, n_head=numpy_gpt.N_HEAD, n_embd=numpy_gpt.N_EMBD)
CONFIG = GPTConfig(numpy_gpt.BLOCK_SIZE, len(numpy_gpt.VOCABULARY), **SIZES, **SETTINGS)
EXACT = dict(rtol=1e-10, atol=1e-12)


@pytest.fixture
def models():
    """The torch model, a classifier, and the model's parameters for numpy, all in float64."""
    model, classifier = (randomised(m).double() for m in (GPT(CONFIG), torch.nn.Linear(CONFIG.n_embd, 2)))
    parameters = {name: p.detach().numpy().copy() for name, p in model.state_dict().items()}
    return model, classifier, parameters


@pytest.fixture
def batch():
    """Tokens and targets (4, 6), some not scored, and labels (4,)."""
    generator = np.random.default_rng(0)
    tokens, targets = generator.integers(CONFIG.vocab_size, size=(2, 4, CONFIG.block_size))
    targets[generator.random(targets.shape) < 0.3] = -1
    return tokens, targets, np.array([0, 1, 1, 0])


def language_loss(model, hidden, targets):
    """Returns the loss in float64; `model(tokens, targets)` computes logits in float32."""
    return F.cross_entropy(model.logits(hidden).flatten(0, 1), torch.tensor(targets).flatten(), ignore_index=-1)


def assert_equal_gradients(gradients, modules):
    expected = {f"{prefix}{name}": p.grad for prefix, m in modules.items() for name, p in m.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, f"{name} isn't tested"
        np.testing.assert_allclose(gradients[name], gradient.numpy(), **EXACT, err_msg=name)


def test_parameters_match_the_model():
    parameters = numpy_gpt.initialise(np.random.default_rng(0), numpy_gpt.SHAPES)
    expected = GPT(CONFIG).state_dict()
    assert {name: p.shape for name, p in parameters.items()} == {name: tuple(p.shape) for name, p in expected.items()}
    for name, parameter in parameters.items():
        assert parameter.std() == pytest.approx(expected[name].std().item(), rel=0.25, abs=1e-12), name
        assert parameter.mean() == pytest.approx(expected[name].mean().item(), abs=0.01), name


def test_logits_equal_torch(models, batch):
    model, _, parameters = models
    hidden, _ = numpy_gpt.trunk(parameters, batch[0])
    logits, _ = numpy_gpt.head(parameters, hidden)
    np.testing.assert_allclose(logits, model(torch.tensor(batch[0])).detach().numpy(), **EXACT)


def test_pre_training_equals_torch(models, batch):
    model, _, parameters = models
    tokens, targets, _ = batch
    expected = language_loss(model, model.hidden(torch.tensor(tokens)), targets)
    expected.backward()
    loss, gradients = numpy_gpt.loss_and_gradients(parameters, tokens, targets)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert_equal_gradients(gradients, {"": model})
    trained_on = model(torch.tensor(tokens), torch.tensor(targets))
    assert loss == pytest.approx((trained_on.total / trained_on.count).item(), rel=1e-6)


def test_fine_tuning_equals_torch(models, batch):
    model, classifier, parameters = models
    parameters |= {f"classifier.{name}": p.detach().numpy().copy() for name, p in classifier.named_parameters()}
    tokens, targets, labels = batch
    hidden = model.hidden(torch.tensor(tokens))
    expected = F.cross_entropy(classifier(hidden[:, -1]), torch.tensor(labels))
    expected = expected + 0.5 * language_loss(model, hidden, targets)
    expected.backward()
    loss, gradients = numpy_gpt.loss_and_gradients(parameters, tokens, targets, labels)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert_equal_gradients(gradients, {"": model, "classifier.": classifier})


def test_adam_equals_torch(models, batch):
    model, _, parameters = models
    tokens, targets, _ = batch
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        language_loss(model, model.hidden(torch.tensor(tokens)), targets).backward()
        optimizer.step()
    numpy_gpt.minimise(parameters, (tokens, targets), steps=10, learning_rate=0.01)
    for name, expected in model.state_dict().items():
        # a key bias shifts whole rows of scores: its gradient is rounding noise, which Adam scales up
        rows = slice(CONFIG.n_embd, 2 * CONFIG.n_embd) if name.endswith("qkv.bias") else slice(0)
        value, expected = np.delete(parameters[name], rows, axis=0), np.delete(expected.numpy(), rows, axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-8, err_msg=name)


def test_the_floor_is_the_entropy_of_the_next_word():
    floor = numpy_gpt.loss_floor(numpy_gpt.SENTENCES)

    def entropy(*counts):
        return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts)

    assert floor == pytest.approx((5 * entropy(3, 2) + 3 * entropy(2, 1) + 2 * entropy(1, 1)) / 14)
    assert round(floor, 4) == 0.4758 and round(math.exp(floor), 3) == 1.609
    assert numpy_gpt.loss_floor(numpy_gpt.REVIEWS) == pytest.approx(4 * 2 * math.log(2) / 20)


def test_training_reaches_the_floor_and_learns_the_labels():
    """`main` prints the losses after each stage, and the class probabilities."""
    result = command("examples/numpy_gpt.py")
    assert result.returncode == 0 and not result.stderr, result.stderr
    lines = result.stdout.splitlines()
    losses = [[float(line.split("loss ")[1].split(",")[0]) for line in lines if line.startswith(name)]
              for name in ("Sentences", "Reviews")]  # fmt: skip
    (sentences, sentences_after), (reviews, reviews_after) = losses
    assert 0.4757 < sentences < 0.4758 + 0.02 and "floor 0.4758 (perplexity 1.609)" in result.stdout
    assert 0.2772 < reviews_after < 0.2773 + 0.05 and reviews_after < reviews
    assert sentences_after < math.log(len(numpy_gpt.VOCABULARY))
    table = [line.split("[Extract]")[1].split() for line in lines if "[Extract]" in line]
    assert [label for _, _, label in table] == list(numpy_gpt.REVIEWS.values())
    for negative, positive, label in table:
        assert float(positive if label == "positive" else negative) > 0.9


def test_it_needs_only_numpy_and_stays_short():
    source = (ROOT / "examples" / "numpy_gpt.py").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import math", "from collections import Counter, defaultdict", "import numpy as np"]
    assert "python examples/numpy_gpt.py" in source and len(source.splitlines()) < 300
