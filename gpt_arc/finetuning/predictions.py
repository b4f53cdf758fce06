"""Predictions of a classifier, and metrics of them."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpt_arc import distributed
from gpt_arc.device import autocast, to_device
from gpt_arc.errors import check_finite
from gpt_arc.extras import import_extra
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig
from gpt_arc.finetuning.encoding import EncodedExamples
from gpt_arc.tables import table


class Predictions(NamedTuple):
    """Logits for each example, and the mean losses."""

    logits: list[list[float]]  # one per class or option; in regression the predicted value
    labels: list[float]
    task_loss: float | None  # None if any label is unknown
    language_loss: float | None  # None of a bidirectional model

    @property
    def losses(self) -> dict[str, float]:
        """The known mean losses by name."""
        losses = {"loss": self.task_loss, "language_loss": self.language_loss}
        return {name: loss for name, loss in losses.items() if loss is not None}

    @property
    def classes(self) -> list[int]:
        return [int(np.argmax(row)) for row in self.logits]

    @property
    def probabilities(self) -> list[list[float]]:
        """Softmax of the logits of each example."""
        return [torch.tensor(row, dtype=torch.float64).softmax(0).tolist() for row in self.logits]


@torch.no_grad()
def predict(
    classifier: Classifier, encoded: EncodedExamples, batch_size: int, device: torch.device, dtype: str,
    processes: int = 1,
) -> Predictions:  # fmt: skip
    """Returns logits in the order of the examples. Dropout is off; each module's mode is restored afterwards.

    If several `processes` share the batches, every process must call this. Raises NotFinite for a logit that isn't.
    """
    modes = {module: module.training for module in classifier.modules()}
    classifier.eval()
    batches, rank = _by_length(encoded, batch_size), distributed.RANK % processes
    computed: dict[int, tuple[Tensor, list[list[float]]]] = {}  # losses and logits of a batch
    for first in tqdm(range(0, len(batches), processes), "predicting", leave=False, disable=None):
        i = min(first + rank, len(batches) - 1)  # all call the model equally often
        batch = to_device(encoded.batch(batches[i]), device)
        with autocast(device, dtype):
            outcome = classifier(*batch)
        both = torch.stack((outcome.task_loss, outcome.language_loss)).cpu().double()
        computed[i] = both, outcome.logits.float().tolist()
    for others in distributed.gather(computed) if processes > 1 else ():
        computed |= others
    logits: list[list[float]] = [[]] * len(encoded)
    losses = torch.zeros(2, dtype=torch.float64)
    for i, rows in enumerate(batches):
        losses += computed[i][0]
        for row, values in zip(rows, computed[i][1]):
            logits[row] = values[: len(encoded.sequences[row])] if classifier.by_option else values
            check_finite(logits[row])
    for module, training in modes.items():
        module.training = training
    task, language = (losses / len(encoded)).tolist()
    unknown = any(example.label is None for example in encoded.examples)
    is_causal = classifier.trunk.config.attention == "causal"
    return Predictions(logits, encoded.labels, None if unknown else task, language if is_causal else None)


def _by_length(encoded: EncodedExamples, size: int) -> list[np.ndarray]:
    """Returns the row numbers of batches, shortest examples first, to save padding."""
    rows = np.argsort(encoded.lengths, kind="stable")
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def metrics_of(predictions: Predictions, config: ClassifierConfig) -> dict[str, float | None]:
    """Returns accuracy, macro F1 and Matthews correlation for classes, and accuracy alone for multiple choice.

    For regression: Pearson and Spearman correlation, None where labels or predictions are constant, and mean squared
    error.
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
    metrics: dict[str, float | None] = {"accuracy": float(scores.accuracy_score(labels, classes))}
    if config.classes is not None:
        with warnings.catch_warnings():  # a class that is never predicted has an F1 of 0
            warnings.simplefilter("ignore")
            metrics["macro_f1"] = float(scores.f1_score(labels, classes, average="macro", zero_division=0.0))
            metrics["matthews"] = float(scores.matthews_corrcoef(labels, classes))
    return metrics


def confusion_matrix(predictions: Predictions, config: ClassifierConfig) -> list[list[int]] | None:
    """Counts by true class (rows) and predicted class (columns); None for a task without classes."""
    if config.classes is None:
        return None
    matrix = np.zeros((len(config.classes),) * 2, dtype=int)
    for label, number in zip(predictions.labels, predictions.classes):
        matrix[int(label), number] += 1
    return matrix.tolist()


def confusion_table(matrix: Sequence[Sequence[int]], classes: Sequence[str], most: int = 12) -> str:
    """Formats a confusion matrix for printing, if it has at most `most` classes."""
    if len(classes) > most:
        return f"the confusion matrix of {len(classes)} classes is in report.json"
    names = [name if len(name) <= 16 else name[:15] + "…" for name in classes]
    return table([["true \\ predicted", *names], *([name, *row] for name, row in zip(names, matrix))])


def prediction_lines(predictions: Predictions, config: ClassifierConfig) -> Iterator[dict[str, Any]]:
    """Yields a prediction (class, option or value) for each example, with probabilities of classes or options."""
    for logits, number, probabilities in zip(predictions.logits, predictions.classes, predictions.probabilities):
        if config.is_regression:
            yield {"prediction": logits[0]}
        elif config.classes is None:
            yield {"prediction": number, "probabilities": probabilities}
        else:
            yield {"prediction": config.classes[number], "probabilities": dict(zip(config.classes, probabilities))}
