"""Pairs of texts, checked by brute force against the token file that they are cut from."""

import numpy as np
import pytest
import torch

from gpt_arc.data.batches import blank_batch, evaluation_batches, training_batches
from gpt_arc.data.datasets import Split
from gpt_arc.data.masking import Masking, scored_tokens, sentence_marks
from gpt_arc.data.next_sentence import SentencePairs, same_document
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from helpers import write_dataset

EOT, MASK, CLS, SEP = 0, 7001, 7002, 7003
T = 20
BYTES = {bytes([byte]): byte for byte in range(256)}


def corpus(lengths, first=1):
    """Documents of these lengths; every token other than EOT occurs once, so that its place is known."""
    tokens, documents = [], []
    for number, length in enumerate(lengths):
        tokens += [EOT, *range(first + len(tokens), first + len(tokens) + length)]
        documents += [number] * (length + 1)
    return np.array(tokens), np.array(documents)


class Dataset:
    def __init__(self, *parts):
        self.parts, self.separator = parts, None
        self.bounds = np.cumsum([0, *map(len, parts)])
        self.masking = Masking(MASK, 7000, 0.15, 3, SentencePairs(CLS, SEP, EOT, 3))

    def dataset_of(self, start):
        part = int(np.searchsorted(self.bounds, start, side="right")) - 1
        return range(self.bounds[part], self.bounds[part + 1])

    def read(self, start, count):
        return np.concatenate(self.parts)[start : min(start + count, self.dataset_of(start).stop)]


def pairs_of(dataset, starts, numbers):
    """The texts, types, text places and labels of rows, before anything is hidden."""
    tokens, types, is_text, labels = dataset.masking.pairs.rows(dataset, np.array(starts), numbers, T)
    assert tokens.shape == types.shape == is_text.shape == (len(starts), T)
    for row, kind, text, label in zip(tokens, types, is_text, labels.tolist()):
        ends = (row == SEP).nonzero().flatten().tolist()
        assert row[0] == CLS and len(ends) == 2 and ends[1] == T - 1
        assert kind.tolist() == [0] * (ends[0] + 1) + [1] * (T - 1 - ends[0])
        assert (~text).nonzero().flatten().tolist() == [0, *ends]
        yield row[1 : ends[0]].numpy(), row[ends[0] + 1 : -1].numpy(), label


@pytest.mark.parametrize("lengths", [[300, 200, 250, 400], [5, 3, 9, 30, 2] * 20, [2] * 150, [1, 900, 1, 40]])
def test_half_of_the_second_texts_follow_and_half_are_of_another_document(lengths):
    tokens, documents = corpus(lengths)
    place = {token: i for i, token in enumerate(tokens.tolist()) if token != EOT}
    count, follows = 400, 0
    starts = np.random.default_rng(0).integers(len(tokens) - T, size=count)
    for start, (first, second, label) in zip(starts, pairs_of(Dataset(tokens), starts, range(count))):
        assert len(first) and len(second) and len(first) + len(second) == T - 3
        assert np.array_equal(first, tokens[start : start + len(first)])
        end, begin = place[int(first[-1])], place[int(second[0])]  # neither is the token between documents
        assert np.array_equal(second, tokens[begin : begin + len(second)])
        assert tokens[begin - 1] != EOT
        if label == 0:
            assert begin == end + 1 and documents[begin] == documents[end]
            follows += 1
        else:
            assert documents[begin] != documents[end]
    assert abs(follows / count - 0.5) < 0.1  # four standard errors


def test_texts_are_cut_anywhere():
    tokens, _ = corpus([500, 500])
    cuts = {len(first) for first, _, _ in pairs_of(Dataset(tokens), [10] * 300, range(300))}
    assert cuts == set(range(1, T - 3))


def test_documents_of_single_tokens_follow_nothing():
    tokens, _ = corpus([1] * 100)
    for first, second, label in pairs_of(Dataset(tokens), [10, 11], [0, 1]):
        assert label == 1 and EOT in (first[-1], second[0])


def test_where_there_is_no_other_document_the_second_text_follows():
    tokens, _ = corpus([200])
    assert {label for _, _, label in pairs_of(Dataset(tokens), [20] * 20, range(20))} == {0}


def test_the_other_document_is_of_the_same_dataset():
    one, _ = corpus([50] * 4)
    two, _ = corpus([50] * 4, first=1000)
    dataset, count = Dataset(one, two), 100
    starts = np.random.default_rng(0).integers(len(one) + len(two), size=count)  # also of windows past an end
    for start, (first, second, _) in zip(starts, pairs_of(dataset, starts, range(count))):
        assert (np.concatenate((first, second)).max() >= 1000) == (start >= len(one))
        assert len(first) + len(second) == T - 3


def test_the_search_for_the_end_of_a_document_reads_all_of_it():
    tokens, documents = corpus([3000, 4095, 4096, 9000, 1])
    dataset = Dataset(tokens)
    for one, other in np.random.default_rng(0).integers(len(tokens), size=(200, 2)).tolist():
        assert same_document(dataset, one, other, EOT) == (documents[one] == documents[other])
    for boundary in np.flatnonzero(tokens == EOT)[1:].tolist():
        assert not same_document(dataset, boundary - 1, boundary, EOT)
        assert same_document(dataset, boundary, boundary + 1, EOT)


def test_masks_leave_the_marks_and_are_as_many_in_each_row():
    tokens, _ = corpus([300] * 4)
    dataset, starts = Dataset(tokens), np.arange(0, 1000, 3)
    inputs, targets, *nothing, types, labels = next(evaluation_batches(dataset, starts, len(starts), T))
    plain, expected_types, is_text, expected = dataset.masking.pairs.rows(dataset, starts, starts, T)
    assert nothing == [None] * 3 and torch.equal(types, expected_types) and torch.equal(labels, expected)
    scored = targets >= 0
    assert (scored.sum(1) == scored_tokens(0.15, T - 3)).all()
    assert not scored[~is_text].any() and torch.equal(inputs[~scored], plain[~scored])
    assert torch.equal(targets[scored], plain[scored])
    assert abs((inputs[scored] == MASK).double().mean() - 0.8) < 0.06


def test_any_number_of_processes_reads_the_same_and_each_epoch_other_pairs():
    tokens, _ = corpus([300] * 4)
    dataset = Dataset(tokens)
    order = Split([tokens], [1.0]).training_order(T, seed=1)
    whole = next(training_batches(dataset, order, 8, 8, 8, T))
    parts = [next(training_batches(dataset, order, 8, 8, 4, T, rank, 2)) for rank in range(2)]
    for together, *each in zip(whole, *parts):
        assert together is None or torch.equal(together, torch.cat(each))
    later = next(evaluation_batches(dataset, order.starts(8, 8), 8, T, numbers=np.arange(100, 108)))
    assert not torch.equal(whole[0], later[0])
    assert [x is None or x.shape for x in blank_batch(dataset, 8, T)] == [x is None or x.shape for x in whole]


def test_rows_that_fill_the_last_batch_have_no_label():
    tokens, _ = corpus([300] * 4)
    *_, last = evaluation_batches(Dataset(tokens), np.array([0, 20, len(tokens) - 5]), 2, T)
    assert last[6][0] >= 0 and last[6][1] == -1 and (last[1][1] == -1).all() and (last[1][0] >= 0).any()


def test_splits_on_disk_say_where_a_dataset_ends(tmp_path):
    tokenizer = BPETokenizer(BYTES, {"<|endoftext|>": 256})
    for name in ("one", "two"):
        write_dataset(tmp_path / name, tokenizer, {"train": np.arange(30)})
    split = Split([TokenFiles(tmp_path / name, "train") for name in ("one", "two")], [0.5, 0.5])
    assert [split.dataset_of(start) for start in (0, 29, 30, 59)] == [
        range(30),
        range(30),
        range(30, 60),
        range(30, 60),
    ]


def test_the_marks_are_the_tokenizers_or_lie_beyond_what_hides_others():
    assert sentence_marks(CharTokenizer("abc"), next_sentence=False) is None
    assert sentence_marks(CharTokenizer("abc"), next_sentence=True) == (4, 5)  # 3 hides others
    special = {"[CLS]": 256, "[SEP]": 257, "[MASK]": 258}
    assert sentence_marks(BPETokenizer(BYTES, special), next_sentence=True) == (256, 257)
    assert sentence_marks(BPETokenizer(BYTES, {"[MASK]": 256}), next_sentence=True) == (257, 258)
