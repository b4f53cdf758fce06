"""Which tokens of a window are hidden."""

import numpy as np
import torch

from gpt_arc.data.batches import evaluation_batches, training_batches
from gpt_arc.data.masking import MASK, Masking, mask_token, scored_tokens
from gpt_arc.data.order import TrainingOrder
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer

MASKING = Masking(token=1000, words=1000, rate=0.15, seed=7)


class Words:
    """A split of the numbers 0 .. 999, three times."""

    separator, masking = None, MASKING

    def __len__(self):
        return 3000

    def read(self, start, count):
        return (np.arange(3000) % 1000)[start : start + count]


def test_fifteen_per_cent_are_scored_and_of_these_eighty_hidden_ten_replaced_ten_shown():
    tokens = torch.arange(1000).expand(200, 1000).contiguous()
    inputs, targets = MASKING.hide(tokens, torch.ones_like(tokens, dtype=torch.bool), range(200))
    scored = targets >= 0
    assert (scored.sum(1) == 150).all()
    assert torch.equal(targets[scored], tokens[scored]) and torch.equal(inputs[~scored], tokens[~scored])
    hidden, shown = inputs[scored] == 1000, inputs[scored] == tokens[scored]
    for share, expected in ((hidden, 0.8), (shown, 0.1), (~hidden & ~shown, 0.1)):
        assert abs(share.double().mean().item() - expected) < 0.01  # 30,000 draws: four standard errors
    assert (scored.sum(0) > 0).all() and scored.sum(0).max() < 60  # every place is as likely: 30 +- 5
    assert torch.equal(tokens, torch.arange(1000).expand(200, 1000))


def test_masks_depend_on_the_seed_and_the_windows_number_alone():
    tokens = torch.arange(40).expand(4, 40)
    real = torch.ones_like(tokens, dtype=torch.bool)
    whole, _ = MASKING.hide(tokens, real, range(10, 14))
    halves = [MASKING.hide(tokens[:2], real[:2], numbers)[0] for numbers in (range(10, 12), range(12, 14))]
    assert torch.equal(whole, torch.cat(halves))
    assert len(set(map(tuple, whole.tolist()))) == 4
    other, _ = Masking(1000, 1000, 0.15, seed=8).hide(tokens, real, range(10, 14))
    assert not torch.equal(whole, other)


def test_a_step_reads_the_same_in_any_number_of_processes_and_each_epoch_other_masks():
    order = TrainingOrder(3000, 20, seed=1)
    batches = training_batches(Words(), order, 8, 8, 8, 20)
    whole, _ = next(batches)
    parts = [next(training_batches(Words(), order, 8, 8, 4, 20, rank, 2))[0] for rank in range(2)]
    assert torch.equal(whole, torch.cat(parts))
    starts = np.zeros(2, dtype=np.int64)
    first, later = (next(evaluation_batches(Words(), starts, 2, 20, numbers=starts + n))[0] for n in (1, 150))
    assert not torch.equal(first, later)
    assert torch.equal(*(next(evaluation_batches(Words(), starts + 5, 2, 20))[0] for _ in range(2)))


def test_the_end_of_a_split_is_hidden_and_not_scored():
    inputs, targets = next(evaluation_batches(Words(), np.array([2990]), 2, 40))
    assert (inputs[0, 10:] == 1000).all() and (targets[0, 10:] == -1).all() and (targets[1] == -1).all()
    assert (targets[0] >= 0).sum() == scored_tokens(0.15, 10) == 2
    assert scored_tokens(0.15, 1) == 1


def test_the_token_that_hides_others():
    assert mask_token(CharTokenizer("abc")) == 3
    assert mask_token(BPETokenizer({bytes([byte]): byte for byte in range(256)}, {MASK: 256})) == 256
