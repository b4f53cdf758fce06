"""What fine-tuning and its use share: encoded examples, batches of them, predictions and how good those are."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.device import autocast, to_device
from gpt_arc.extras import import_extra
from gpt_arc.finetuning.classifier import Batch, Classifier, ClassifierConfig, make_batch
from gpt_arc.finetuning.examples import Example, label_number, label_value, sequences_of
from gpt_arc.tables import table


class EncodedExamples(NamedTuple):
    """Examples as tokens."""

    sequences: list[list[list[int]]]  # of each example
    labels: list[float]  # whole numbers of classes, -1 unknown; or values, not a number where unknown
    cut: int  # how many examples were too long
    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """The longest sequence of each example, in tokens."""
        return np.array([max(map(len, sequences)) for sequences in self.sequences])

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens and labels."""
        return hashlib.sha256(json.dumps([self.sequences, self.labels]).encode()).hexdigest()

    def batch(self, rows: Sequence[int]) -> Batch:
        return make_batch([self.sequences[row] for row in rows], [self.labels[row] for row in rows])


def encode_examples(examples: Sequence[Example], config: ClassifierConfig, tokenizer: Tokenizer) -> EncodedExamples:
    """The examples as a classifier reads them. Raises UserError, naming the row, for a label or character not known."""
    sequences, labels, cut = [], [], 0
    for example in tqdm(examples, "encoding", leave=False, disable=None):
        found, was_cut = sequences_of(example, config.task, tokenizer, config.special, config.max_tokens)
        sequences.append(found)
        cut += was_cut
        if config.is_regression:
            labels.append(label_value(example))
        elif config.classes is None:
            labels.append(-1 if example.label is None else int(example.label))
        else:
            labels.append(label_number(example, config.classes))
    return EncodedExamples(sequences, labels, cut, examples)


class Predictions(NamedTuple):
    """What a classifier says of each example, and the mean losses."""

    logits: list[list[float]]  # by class, by option, or the one value
    labels: list[float]
    task_loss: float | None  # None if not all labels are known
    language_loss: float

    @property
    def losses(self) -> dict[str, float]:
        """The mean losses that are known, by name."""
        known = {} if self.task_loss is None else {"loss": self.task_loss}
        return known | {"language_loss": self.language_loss}

    @property
    def classes(self) -> list[int]:
        return [int(np.argmax(row)) for row in self.logits]

    @property
    def probabilities(self) -> list[list[float]]:
        """Softmax of the logits of each example."""
        return [torch.tensor(row, dtype=torch.float64).softmax(0).tolist() for row in self.logits]


@torch.no_grad()
def predict(
    classifier: Classifier, encoded: EncodedExamples, batch_size: int, device: torch.device, dtype: str
) -> Predictions:
    """The classifier's logits for each example, in their order; dropout is off, and as it was afterwards."""
    modes = {module: module.training for module in classifier.modules()}
    classifier.eval()
    logits: list[list[float]] = [[]] * len(encoded)
    losses = torch.zeros(2, dtype=torch.float64)
    for rows in tqdm(_by_length(encoded, batch_size), "predicting", leave=False, disable=None):
        batch = to_device(encoded.batch(rows), device)
        with autocast(device, dtype):
            outcome = classifier(*batch)
        losses += torch.stack((outcome.task_loss, outcome.language_loss)).double().cpu()
        for row, values in zip(rows, outcome.logits.float().tolist()):
            logits[row] = values[: len(encoded.sequences[row])] if classifier.by_option else values
    for module, training in modes.items():
        module.training = training
    task, language = (losses / len(encoded)).tolist()
    unknown = any(example.label is None for example in encoded.examples)
    return Predictions(logits, encoded.labels, None if unknown else task, language)


def _by_length(encoded: EncodedExamples, size: int) -> list[np.ndarray]:
    rows = np.argsort(encoded.lengths, kind="stable")
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def metrics_of(predictions: Predictions, config: ClassifierConfig) -> dict[str, float | None]:
    """Accuracy, macro F1 and Matthews' correlation of classes; Pearson's, Spearman's and squared error of numbers.

    Of options only accuracy says something. A correlation is None where one side is constant.
    """
    if config.is_regression:
        stats = import_extra("scipy.stats")
        labels, values = np.array(predictions.labels), np.array(predictions.logits)[:, 0]
        constant = len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(values) == 0
        return {
            "pearson": None if constant else float(stats.pearsonr(labels, values).statistic),
            "spearman": None if constant else float(stats.spearmanr(labels, values).statistic),
            "mean_squared_error": float(np.mean((labels - values) ** 2)),
        }
    scores = import_extra("sklearn.metrics")
    labels, classes = predictions.labels, predictions.classes
    metrics = {"accuracy": float(scores.accuracy_score(labels, classes))}
    if config.classes is not None:
        with warnings.catch_warnings():  # of a class that was never predicted, whose F1 is 0
            warnings.simplefilter("ignore")
            metrics["macro_f1"] = float(scores.f1_score(labels, classes, average="macro", zero_division=0.0))
            metrics["matthews"] = float(scores.matthews_corrcoef(labels, classes))
    return metrics


def confusion_matrix(predictions: Predictions, config: ClassifierConfig) -> list[list[int]] | None:
    """Counts by true class (rows) and predicted class (columns); None for a task without classes."""
    if config.classes is None:
        return None
    matrix = np.zeros((len(config.classes),) * 2, dtype=int)
    np.add.at(matrix, (predictions.labels, predictions.classes), 1)
    return matrix.tolist()


def confusion_table(matrix: Sequence[Sequence[int]], classes: Sequence[str], most: int = 12) -> str:
    """A confusion matrix to print, of so many classes at most."""
    if len(classes) > most:
        return f"the confusion matrix of {len(classes)} classes stands in report.json"
    names = [name if len(name) <= 16 else name[:15] + "…" for name in classes]
    return table([["true \\ predicted", *names], *([name, *row] for name, row in zip(names, matrix))])


def prediction_lines(predictions: Predictions, config: ClassifierConfig) -> Iterator[dict[str, Any]]:
    """What is written of each example: its class, option or value, and the probabilities of classes or options."""
    for logits, number, probabilities in zip(predictions.logits, predictions.classes, predictions.probabilities):
        if config.is_regression:
            yield {"prediction": logits[0]}
        elif config.classes is None:
            yield {"prediction": number, "probabilities": probabilities}
        else:
            yield {"prediction": config.classes[number], "probabilities": dict(zip(config.classes, probabilities))}
