"""GPT-1's second stage: a linear head on a trained GPT reads the hidden state of the last token.

    classifier, tokenizer = load_classifier("out/finetune")     # trained by stages/finetune.py
    outcome = classifier(*make_batch(sequences, labels))        # logits, and the summed task and language-model losses

A classifier's directory is a model directory, readable by `load_model`, plus classifier.json and
classifier.safetensors.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import ConfigDict, with_config
from safetensors.torch import save_file
from torch import Tensor

from gpt_arc.data.batches import pad_rows
from gpt_arc.data.masking import sentence_marks
from gpt_arc.data.tokenizer import Tokenizer, load_tokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import replacing, write_file
from gpt_arc.finetuning.examples import Columns, SpecialTokens
from gpt_arc.finetuning.lora import with_merged_adapters
from gpt_arc.finetuning.lstm import LSTM
from gpt_arc.manifest import check_files, record_files
from gpt_arc.nn.head_loss import IGNORED
from gpt_arc.nn.meta import meta_device
from gpt_arc.nn.names import TaskKind
from gpt_arc.reading import adapter_of, read_json, reading
from gpt_arc.settings import Positive
from gpt_arc.weights.directory import load_config, load_text_model, local_directory, of_one_checkpoint, save_model
from gpt_arc.weights.edit import with_more_tokens
from gpt_arc.weights.tensor_files import read_tensors
from model import GPT

LARGEST_CONFIG = 16 << 20  # bytes of classifier.json, which names every class
CONFIG, WEIGHTS, FORMAT_VERSION = "classifier.json", "classifier.safetensors", 1


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier needs besides its model."""

    task: TaskKind
    classes: tuple[str, ...] | None  # class names; None: labels are values or option numbers
    special: SpecialTokens
    columns: Columns  # of the training file
    max_tokens: int  # longer sequences are cut to this
    dropout: float = 0.1  # on the head's input
    lstm: bool = False  # whether the trunk is an LSTM
    mean: float = 0.0  # in regression: the head's output is (value - mean) / scale
    scale: Positive = 1.0

    @property
    def outputs(self) -> int:
        """Logits per sequence: one per class; a single one for multiple choice and regression."""
        return 1 if self.classes is None else len(self.classes)

    @property
    def is_regression(self) -> bool:
        return self.classes is None and self.task != "multiple_choice"


class Batch(NamedTuple):
    """B examples of up to O sequences of up to T tokens."""

    tokens: Tensor  # (B, O, T) int64; padding at the end may hold anything
    lengths: Tensor  # (B, O) int64; 0 where an example has fewer sequences
    labels: Tensor  # (B,) int64, -1 where unknown; float32 for regression


class Outcome(NamedTuple):
    """A classifier's logits and losses for a batch."""

    logits: Tensor  # (B, classes); multiple choice (B, O), -inf for missing options; regression (B, 1), the values
    # () sum over examples: cross-entropy in nats or squared error; in training the latter in units of scale^2, and with
    # router losses
    task_loss: Tensor
    language_loss: Tensor  # () nats per token, averaged over an example's sequences, summed over examples


def make_batch(examples: Sequence[Sequence[list[int]]], labels: Sequence[float]) -> Batch:
    """Pads the examples' sequences into a batch. Integer labels are classes, floats are values."""
    options = max(len(sequences) for sequences in examples)
    lengths = pad_rows([len(sequence) for sequence in sequences] for sequences in examples)
    rows = (row for sequences in examples for row in [*sequences, *[[]] * (options - len(sequences))])
    return Batch(pad_rows(rows).unflatten(0, (len(examples), options)), lengths, torch.tensor(labels))


def combined_loss(task_loss: Tensor, language_loss: Tensor, weight: float) -> Tensor:
    """GPT-1's objective for its second stage, L3 = L2 + weight L1 (Radford et al. 2018, equation 5)."""
    return task_loss + weight * language_loss


class Classifier(nn.Module):
    """A trunk, and a linear head on the hidden state of each sequence's last token, [extract]; on that of its first
    token, [start], if the trunk is bidirectional.

    Similarity adds the hidden states of both orders of the texts. Multiple choice has one logit per option and a
    softmax over options. The head has no bias (Radford et al. 2018, equation 3).
    """

    def __init__(self, trunk: GPT, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.n_embd, config.outputs, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor, with_language: bool = True) -> Outcome:
        """Returns logits and losses of a `Batch`. The language-model loss is 0 without `with_language` and in a
        bidirectional model."""
        (batch, options), config = lengths.shape, self.config
        present = lengths > 0
        is_causal = self.trunk.config.attention == "causal"
        types = self.types(tokens.flatten(0, 1))
        hidden = self.trunk.hidden(tokens.flatten(0, 1), lengths=lengths.flatten(), types=types)  # (B O, T, C)
        read = (lengths.flatten() - 1).clamp(min=0) if is_causal else torch.zeros_like(lengths.flatten())
        extracted = hidden[torch.arange(len(read), device=read.device), read].unflatten(0, (batch, options))
        if config.task == "similarity":
            extracted = extracted.float().sum(1, keepdim=True)
        dropped = F.dropout(
            torch.ones_like(extracted[:, :1]), config.dropout, self.training
        )  # one mask for all options
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.head(
                extracted.type_as(self.head.weight) * dropped.type_as(self.head.weight)
            )  # (B, O or 1, K)
            logits = logits.squeeze(-1).masked_fill(~present, -math.inf) if self.by_option else logits.squeeze(1)
            if config.is_regression:
                logits = config.mean + config.scale * logits
                task_loss = (logits.squeeze(1) - labels).square().sum()
                task_loss = task_loss / config.scale**2 if self.training else task_loss
            else:
                task_loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        if self.training:  # a mixture of experts has router losses, means over the batch
            task_loss = task_loss + batch * sum(self.trunk.router_losses().values())
        language_loss = task_loss.new_zeros(())
        if with_language and is_causal:
            language_loss = self.trunk.loss(hidden, *self.language_targets(tokens, lengths))
        return Outcome(logits, task_loss, language_loss)

    def types(self, tokens: Tensor) -> Tensor | None:
        """Returns the types of tokens (B, T), the number of delimiters before each; None for a trunk without types."""
        count = self.trunk.config.token_types
        if not count:
            return None
        delimiters = (tokens == self.config.special.delimiter).long()
        return (delimiters.cumsum(1) - delimiters).clamp(max=count - 1)

    @property
    def by_option(self) -> bool:
        return self.config.task == "multiple_choice"

    @staticmethod
    def language_targets(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns next tokens and their weights, both (B O, T). The weights of each of an example's n sequences
        add up to 1/n.

        openai/finetune-transformer-lm train.py:176-178 also averages over a sequence first, then over sequences.
        """
        length = tokens.size(-1)
        scored = torch.arange(1, length + 1, device=tokens.device) < lengths[..., None]  # (B, O, T)
        targets = torch.where(scored, F.pad(tokens[..., 1:], (0, 1)), IGNORED)
        sequences = (lengths > 0).sum(1)[:, None, None]
        weights = scored / ((lengths[..., None] - 1).clamp(min=1) * sequences)
        return targets.flatten(0, 1), weights.flatten(0, 1)


def with_special_tokens(model: GPT, tokenizer: Tokenizer | None = None) -> tuple[GPT, SpecialTokens]:
    """Returns the model with GPT-1's three special tokens added; a BERT has [CLS] and [SEP] for them."""
    marks = tokenizer and sentence_marks(tokenizer, model.config.next_sentence)
    if model.config.attention == "bidirectional" and marks:
        return model, SpecialTokens(marks[0], marks[1], marks[1])
    return with_more_tokens(model, 3), SpecialTokens.after(model.config.vocab_size)


def save_classifier(classifier: Classifier, tokenizer: Tokenizer, directory: Path | str) -> None:
    """Writes a classifier's directory with adapters merged. Existing files are replaced one by one."""
    save_model(with_merged_adapters(classifier.trunk), tokenizer, directory)
    with replacing(Path(directory) / WEIGHTS) as temporary:
        save_file({"head.weight": classifier.head.weight.detach().cpu().contiguous()}, temporary, {"format": "pt"})
    content = {"format_version": FORMAT_VERSION, **asdict(classifier.config)}
    content["special"] = classifier.config.special._asdict()
    write_file(Path(directory) / CONFIG, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    record_files(Path(directory), WEIGHTS, CONFIG)


def is_classifier(path: Path | str) -> bool:
    """Whether `path` is a classifier's directory or the run folder of a classifier."""
    directory = local_directory(path)
    return directory is not None and (directory / CONFIG).is_file()


@of_one_checkpoint
def load_classifier(path: Path | str, dtype: torch.dtype = torch.float32) -> tuple[Classifier, Tokenizer]:
    """Returns the classifier, on the CPU and in training mode, and its tokenizer.

    `path` is its directory or run folder. Raises UserError naming the file if something is missing or damaged.
    """
    directory = Path(path)
    config = read_config(directory)
    if config.lstm:
        trunk, tokenizer = _load_lstm(directory, dtype), load_tokenizer(directory)
    else:
        trunk, tokenizer = load_text_model(directory, dtype=dtype, causal=False)
    classifier = Classifier(trunk, config)
    if config.lstm:
        check_files(directory, sizes_only=(".pt",))
    head = read_tensors(directory / WEIGHTS, {"head.weight": classifier.head.weight.shape}, dtype)
    classifier.head.to(dtype).load_state_dict({"weight": head["head.weight"]})
    return classifier, tokenizer


def _load_lstm(directory: Path, dtype: torch.dtype) -> LSTM:
    config = load_config(directory)
    with meta_device():
        shapes = {name: tensor.shape for name, tensor in LSTM(config).state_dict().items()}
    tensors = read_tensors(directory / "model.safetensors", shapes, dtype)
    lstm = LSTM(config).to(dtype)
    lstm.load_state_dict(tensors)
    return lstm


def read_config(directory: Path) -> ClassifierConfig:
    path = directory / CONFIG
    if not path.exists():
        raise UserError(f"{path.parent} is a model without a classifier's head: train one with --train FILE")
    content = read_json(path, limit=LARGEST_CONFIG)
    with reading(path):
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}; this program reads version {FORMAT_VERSION}")
        return adapter_of(ClassifierConfig).validate_json(json.dumps(content), strict=True)
