"""Compares an export with what transformers makes of it: outputs of a few sequences and token ids of a few texts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.errors import UserError
from gpt_arc.extras import import_extra

TOLERANCE = 1e-4  # largest difference of outputs, as a share of the largest output if that is above 1
LENGTHS = (64, 40, 3)  # of the sequences, in tokens
SAMPLES = ("The cat sat on the mat, didn't it? 1234", "naïve 漢字 🙂\n\n\tx = f(y)  ;", "a")


@dataclass
class Reference:
    """What an export should compute. B sequences of up to T tokens."""

    module: nn.Module
    outputs: Callable[[Tensor, Tensor], Tensor]  # of tokens (B, T), padded after lengths (B,)
    last: int | None = None  # token that ends every sequence; None: any, and all sequences have the same length
    encode: Callable[[str], list[int]] | None = None  # None: token ids aren't compared
    encode_theirs: Callable[[Any, str], list[int]] | None = None  # the same by a tokenizer of transformers


@torch.no_grad()
def difference(reference: Reference, folder: Path, config: dict[str, Any], block_size: int) -> tuple[float, float]:
    """Returns the largest difference of outputs and the bound on it. Both models compute in float32.

    Our weights are rounded to the type of the export.
    """
    transformers = import_extra("transformers")
    # transformers' faster products of experts refuse widths that aren't multiples of 4
    eager = {"experts_implementation": "eager"} if "num_local_experts" in config else {}
    theirs = getattr(transformers, config["architectures"][0])
    theirs = theirs.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **eager).eval()
    reference.module.to(getattr(torch, config["dtype"])).float().eval()
    lengths = torch.tensor([min(length, block_size) for length in LENGTHS])
    if reference.last is None:
        lengths[:] = lengths.max()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config["vocab_size"], (len(lengths), int(lengths.max())), generator=generator)
    real = torch.arange(tokens.size(1)) < lengths[:, None]
    if reference.last is None:
        output = theirs(tokens)
        both = "seq_relationship_logits" in output  # of a BertForPreTraining
        logits = torch.cat(tuple(x.flatten(1) for x in output.values()), dim=1) if both else output.logits
    elif "DoubleHeads" in type(theirs).__name__:
        tokens[torch.arange(len(lengths)), lengths - 1] = reference.last
        logits = theirs(tokens[:, None], mc_token_ids=lengths[:, None] - 1).mc_logits.view(len(lengths), 1)
    else:
        tokens[torch.arange(len(lengths)), lengths - 1] = reference.last
        tokens = tokens.masked_fill(~real, config["pad_token_id"])
        logits = theirs(tokens, attention_mask=real.long()).logits
    ours = reference.outputs(tokens, lengths).view_as(logits)
    return (ours - logits).abs().max().item(), TOLERANCE * max(1.0, ours.abs().max().item())


def differing_texts(reference: Reference, folder: Path, tokenizer: Tokenizer) -> tuple[list[str], int]:
    """Returns the texts that transformers' tokenizer encodes otherwise, and the number of texts compared."""
    encode, encode_theirs = reference.encode, reference.encode_theirs
    if encode is None or encode_theirs is None:
        return [], 0
    loaded = import_extra("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(tokenizer.text_size, (20, 12), generator=generator).tolist()
    texts = [*SAMPLES, *(tokenizer.decode(ids).strip() for ids in drawn)]
    marks = loaded.get_added_vocab()  # spelled out in a text, they are text for us
    differing, compared = [], 0
    for text in texts:
        if not text or any(mark in text for mark in marks):
            continue
        try:
            ours = encode(text)
        except UserError:  # a character that isn't in the vocabulary
            continue
        compared += 1
        if encode_theirs(loaded, text) != ours:
            differing.append(text)
    return differing, compared
