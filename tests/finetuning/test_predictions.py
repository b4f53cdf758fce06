"""Batches, predictions and metrics of fine-tuning, against counts by hand and the classifier itself."""

import itertools
import math

import numpy as np
import pytest
import torch

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, make_batch
from gpt_arc.finetuning.encoding import EncodedExamples, encode_examples
from gpt_arc.finetuning.examples import Columns, Example, SpecialTokens
from gpt_arc.finetuning.predictions import (
    Predictions,
    confusion_matrix,
    confusion_table,
    metrics_of,
    predict,
    prediction_lines,
)
from gpt_arc.training.epochs import POOL, epoch_batches
from helpers import randomised, without_float64
from model import GPT, GPTConfig

CPU = torch.device("cpu")
TOKENIZER = CharTokenizer(" abcdefghijklmnopqrstuvwxyz")


def config_of(task="classification", classes=("no", "yes"), max_tokens=16):
    return ClassifierConfig(task, classes, SpecialTokens.after(27), Columns.usual(task), max_tokens)


def classifier_of(config):
    trunk = GPT(GPTConfig(16, 30, 2, 2, 16, norm_position="post", dropout=0.2))
    return randomised(Classifier(trunk, config))


def encoded(config, *rows):
    examples = [Example(texts, label, f"rows.csv, line {i}") for i, (*texts, label) in enumerate(rows, start=2)]
    return encode_examples(examples, config, TOKENIZER)


# ---- encoding


def test_encoding_gives_sequences_labels_and_the_number_of_cut_texts():
    examples = encoded(config_of(max_tokens=8), ("ab", "yes"), ("abcdefghij", "no"), ("", None))
    assert examples.sequences == [[[27, 1, 2, 29]], [[27, *range(1, 7), 29]], [[27, 29]]]
    assert (
        examples.labels == [1, 0, -1]
        and examples.cut == 1
        and len(examples) == 3
        and examples.lengths.tolist() == [4, 8, 2]
    )
    tokens, lengths, labels = examples.batch([2, 0])
    assert tokens[1].tolist() == [[27, 1, 2, 29]] and lengths.tolist() == [[2], [4]] and labels.tolist() == [-1, 1]
    assert labels.dtype == torch.int64


def test_labels_are_numbers_or_indices_of_options():
    scale = encoded(config_of("similarity", None), ("ab", "c", "2"), ("ab", "c", None))
    assert scale.labels[0] == 2.0 and math.isnan(scale.labels[1])
    assert scale.batch([0]).labels.dtype == torch.float32
    choice = encoded(config_of("multiple_choice", None), ("ab", "c", "defgh", "1"), ("ab", "c", "d", None))
    assert choice.labels == [1, -1] and choice.lengths.tolist() == [10, 6]


def test_a_row_that_cannot_be_encoded_is_named():
    for row, message in ((("ab", "maybe"), "line 2: the label 'maybe'"), (("a!", "no"), "line 2: the character '!'")):
        with pytest.raises(UserError, match=message):
            encoded(config_of(), row)


# ---- batches


def padded(batches, lengths):
    return sum(len(rows) * lengths[rows].max() for rows in batches)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(1, 4), (8, 4), (1003, 8), (401, 1), (5, 100)])
def test_an_epoch_has_each_row_once_and_all_batches_but_one_are_full(rows, size, group):
    lengths = np.random.default_rng(0).integers(1, 100, rows)
    batches = epoch_batches(lengths, size, 7, 0, group)
    assert sorted(itertools.chain(*batches)) == list(range(rows))
    assert sorted(map(len, batches)) == sorted([size] * (rows // size) + [rows % size] * (rows % size > 0))


@pytest.mark.parametrize("group", [False, True])
def test_the_order_depends_on_seed_and_epoch(group):
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    orders = [
        np.concatenate(epoch_batches(lengths, 8, seed, epoch, group)).tolist() for seed in (0, 1) for epoch in (0, 1, 2)
    ]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert orders[1] == np.concatenate(epoch_batches(lengths, 8, 0, 1, group)).tolist()
    assert orders[0] != sorted(orders[0])


def test_grouping_by_length_saves_padding_and_keeps_batches_shuffled():
    lengths = np.random.default_rng(0).integers(1, 200, 3 * POOL * 8 + 50)
    loose, grouped = (epoch_batches(lengths, 8, 0, 0, group) for group in (False, True))
    wasted = [padded(batches, lengths) - lengths.sum() for batches in (loose, grouped)]
    assert wasted[1] < 0.1 * wasted[0]
    longest = np.array([lengths[rows].max() for rows in grouped])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3
    assert len(
        {tuple(sorted(rows)) for epoch in range(3) for rows in epoch_batches(lengths, 8, 0, epoch, True)}
    ) > 2 * (len(grouped))


# ---- predictions

TASKS = {
    "classification": (("no", "yes"), [("abc", "yes"), ("defghijkl", "no"), ("m", "no"), ("nop", "yes"), ("q", "no")]),
    "similarity": (None, [("abc", "d", "1"), ("defgh", "ij", "-2"), ("m", "n", "0.5")]),
    "multiple_choice": (
        None,
        [("ab", "c", "de", "1"), ("abcd", "e", "f", "ghi", "jklm", "3"), ("ab", "c", "d", "efg", "0")],
    ),
}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_in_the_order_of_examples(task, batch_size):
    classes, rows = TASKS[task]
    config = config_of(task, classes)
    classifier, examples = classifier_of(config), encoded(config, *rows)
    predictions = predict(classifier, examples, batch_size, CPU, "float32")
    task_loss = language_loss = 0.0
    for sequences, label, row in zip(examples.sequences, examples.labels, predictions.logits):
        outcome = classifier(*make_batch([sequences], [label]))
        assert row == pytest.approx(outcome.logits[0].tolist(), rel=1e-5, abs=1e-5)
        task_loss += outcome.task_loss.item() / len(rows)
        language_loss += outcome.language_loss.item() / len(rows)
    assert predictions.task_loss == pytest.approx(task_loss, rel=1e-5)
    assert predictions.language_loss == pytest.approx(language_loss, rel=1e-5)
    assert predictions.losses == {"loss": predictions.task_loss, "language_loss": predictions.language_loss}
    if task == "multiple_choice":
        assert [len(row) for row in predictions.logits] == [2, 4, 3]
        assert [len(row) for row in predictions.probabilities] == [2, 4, 3]
        assert [sum(row) for row in predictions.probabilities] == pytest.approx([1, 1, 1])


def test_losses_are_added_up_on_the_cpu(monkeypatch):
    config = config_of()
    classifier, examples = classifier_of(config), encoded(config, *TASKS["classification"][1])
    expected = predict(classifier, examples, 2, CPU, "float32").losses
    without_float64(monkeypatch)
    assert predict(classifier, examples, 2, CPU, "float32").losses == expected


def test_predicting_restores_modes_and_uses_no_dropout():
    config = config_of()
    classifier, examples = classifier_of(config), encoded(config, *TASKS["classification"][1])
    expected = predict(classifier, examples, 2, CPU, "float32").logits
    assert not classifier.training
    classifier.train()
    classifier.trunk.eval()
    assert predict(classifier, examples, 2, CPU, "float32").logits == expected
    assert classifier.training and not any(module.training for module in classifier.trunk.modules())
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_label_gives_no_loss(task):
    classes, rows = TASKS[task]
    config = config_of(task, classes)
    unlabelled = [(*texts, None) if i == 1 else (*texts, label) for i, (*texts, label) in enumerate(rows)]
    classifier = classifier_of(config)
    predictions, labelled = (
        predict(classifier, encoded(config, *each), 2, CPU, "float32") for each in (unlabelled, rows)
    )
    assert predictions.task_loss is None and list(predictions.losses) == ["language_loss"]
    assert predictions.logits == labelled.logits and predictions.language_loss == labelled.language_loss


def predictions_from(logits, labels):
    return Predictions(logits, labels, 0.0, 0.0)


def test_prediction_lines():
    def lines(config, *logits):
        return list(prediction_lines(predictions_from(list(logits), []), config))

    assert lines(config_of(), [0.0, math.log(3)], [1.0, 1.0]) == [
        {"prediction": "yes", "probabilities": {"no": pytest.approx(0.25), "yes": pytest.approx(0.75)}},
        {"prediction": "no", "probabilities": {"no": 0.5, "yes": 0.5}},
    ]
    assert lines(config_of("similarity", None), [1.5], [2.5]) == [{"prediction": 1.5}, {"prediction": 2.5}]
    assert lines(config_of("multiple_choice", None), [0.0, 0.0, math.log(2)]) == [
        {"prediction": 2, "probabilities": pytest.approx([0.25, 0.25, 0.5])}
    ]


# ---- metrics


def choosing(classes, number=2):
    return [[float(i == chosen) for i in range(number)] for chosen in classes]


def test_metrics_of_two_classes_by_hand():
    """3 true positives, 1 false negative, 2 false positives, 4 true negatives."""
    labels, chosen = [1] * 4 + [0] * 6, [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    predictions = predictions_from(choosing(chosen), labels)
    metrics = metrics_of(predictions, config_of())
    f1 = (2 * 3 / (2 * 3 + 1 + 2) + 2 * 4 / (2 * 4 + 1 + 2)) / 2
    matthews = (3 * 4 - 2 * 1) / math.sqrt((3 + 2) * (3 + 1) * (4 + 2) * (4 + 1))
    assert metrics == pytest.approx({"accuracy": 0.7, "macro_f1": f1, "matthews": matthews})
    assert confusion_matrix(predictions, config_of()) == [[4, 2], [1, 3]]


def test_metrics_of_three_classes_by_hand():
    config = config_of(classes=("a", "b", "c"))
    predictions = predictions_from(choosing([0, 0, 1, 0, 0, 1], 3), [0, 0, 1, 1, 2, 2])
    metrics = metrics_of(predictions, config)
    # Gorodkin's correlation: (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)), p = 4, 2, 0 and t = 2, 2, 2
    matthews = (3 * 6 - (4 * 2 + 2 * 2)) / math.sqrt((36 - 20) * (36 - 12))
    assert metrics == pytest.approx({"accuracy": 0.5, "macro_f1": (4 / 6 + 2 / 4 + 0) / 3, "matthews": matthews})
    assert confusion_matrix(predictions, config) == [[2, 0, 0], [1, 1, 0], [1, 1, 0]]


def test_metrics_of_numbers_by_hand():
    config = config_of("similarity", None)
    labels, values = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 4.0, 10.0]
    predictions = predictions_from([[value] for value in values], labels)
    # around the means 3 and 4: the products add up to 19, the squares to 10 and 50; ranks differ by 0 1 1 0 0
    expected = {"pearson": 19 / math.sqrt(10 * 50), "spearman": 1 - 6 * 2 / (5 * 24), "mean_squared_error": 27 / 5}
    assert metrics_of(predictions, config) == pytest.approx(expected)
    assert confusion_matrix(predictions, config) is None
    constant = metrics_of(predictions_from([[2.0]] * 5, labels), config)
    assert constant == {"pearson": None, "spearman": None, "mean_squared_error": 3.0}


def test_options_have_only_accuracy():
    config = config_of("multiple_choice", None)
    predictions = predictions_from([[0.0, 1.0], [0.0, 0.5, 1.0, 0.0], [2.0, 1.0]], [1, 2, 1])
    assert metrics_of(predictions, config) == {"accuracy": pytest.approx(2 / 3)}
    assert confusion_matrix(predictions, config) is None


def test_a_confusion_matrix_is_printed_with_its_classes():
    shown = confusion_table([[4, 2], [1, 13]], ("no", "a class of a long name"))
    assert shown.splitlines() == [
        "true \\ predicted  no  a class of a lo…",
        "no                 4                 2",
        "a class of a lo…   1                13",
    ]
    assert "13 classes" in confusion_table([[0] * 13] * 13, [str(i) for i in range(13)])


def test_an_encoded_split_counts_its_examples():
    assert len(EncodedExamples([[[1]], [[2]]], [0, 1], 0, [])) == 2
