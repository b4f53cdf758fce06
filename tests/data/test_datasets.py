"""Token files, the training order and evaluation windows."""

import itertools
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_arc.data.batches import evaluation_batches, prefetch, training_batches, windows
from gpt_arc.data.datasets import EXAMPLES, Corpus, Source, Split, open_corpus, prepare_dataset
from gpt_arc.data.order import TrainingOrder, _mix, evaluation_starts, permute
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.manifest import record_files
from helpers import ROOT, write_dataset, write_tokens


def test_token_files_have_llm_c_s_header_and_width(tmp_path):
    for name, vocab, magic, version, dtype in (
        ("a", 65_536, 20240520, 1, "<u2"),
        ("b", 65_537, 20240801, 7, "<u4"),
    ):
        tokens = np.array([0, 5, vocab - 1])
        write_tokens(tmp_path / f"{name}.bin", tokens, vocab)
        content = (tmp_path / f"{name}.bin").read_bytes()
        header = np.frombuffer(content[:1024], dtype="<i4")
        assert header[:3].tolist() == [magic, version, 3] and not header[3:].any()
        assert np.frombuffer(content[1024:], dtype=dtype).tolist() == tokens.tolist()


def test_ids_outside_the_vocabulary_are_refused_and_nothing_is_written(tmp_path):
    for wrong in (-1, 10, 70_000):
        with pytest.raises(UserError, match=f"the token id {wrong} lies outside the vocabulary of 10"):
            write_tokens(tmp_path / "x.bin", np.array([1, wrong, 2]), 10)
    assert list(tmp_path.iterdir()) == []


def test_shards_read_as_one_sequence(tmp_path):
    tokens = np.arange(100)
    for i, (start, end, vocab) in enumerate([(0, 40, 1000), (40, 41, 100_000), (41, 100, 1000)]):
        write_tokens(tmp_path / f"corpus_train_{i:06}.bin", tokens[start:end], vocab)
    files = TokenFiles(tmp_path, "train")
    assert len(files) == 100
    for start, count in itertools.product(range(0, 100, 7), (1, 13, 60)):
        count = min(count, 100 - start)
        assert files.read(start, count).tolist() == tokens[start : start + count].tolist()


def test_a_split_is_named_by_a_word_of_the_file_name(tmp_path):
    for name in ("medieval_train_0", "medieval_val_0", "val", "fineweb_val_000001", "val2"):
        write_tokens(tmp_path / f"{name}.bin", np.zeros(3, int), 10)
    names = [path.stem for path in TokenFiles(tmp_path, "val").paths]
    assert names == ["fineweb_val_000001", "medieval_val_0", "val", "val2"]
    assert [path.stem for path in TokenFiles(tmp_path, "train").paths] == ["medieval_train_0"]


def test_tokens_beyond_the_vocabulary_are_refused_when_read(tmp_path):
    write_tokens(tmp_path / "train.bin", np.arange(10), 10)
    assert len(TokenFiles(tmp_path, "train", 10).read(0, 10)) == 10
    with pytest.raises(UserError, match="has the token id 9, beyond vocab_size = 9"):
        TokenFiles(tmp_path, "train", 9).read(0, 10)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no token file for its train split"):
        TokenFiles(tmp_path, "train")
    write_tokens(tmp_path / "train.bin", np.arange(50), 100)
    whole = (tmp_path / "train.bin").read_bytes()
    for content, sentence in (
        (whole[:-2], "is damaged, 1122 bytes instead of 1124"),
        (b"x" * 2000, "not a token file"),
    ):
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            TokenFiles(tmp_path, "train")
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match="not a token file"):
        TokenFiles(tmp_path, "train")


def test_a_split_shorter_than_a_window_is_refused(tmp_path):
    tokenizer = CharTokenizer("ab")
    write_dataset(tmp_path / "d", tokenizer, {"train": np.zeros(9, int), "val": np.zeros(8, int)})
    corpus = open_corpus([Source(str(tmp_path / "d"), 1.0)])
    assert len(corpus.split("train", 8, 2, False)) == 9
    with pytest.raises(UserError, match="block_size = 8 is longer than the val split"):
        corpus.split("val", 8, 2, False)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def permutations(size, keys):
    """What `permute` gives for each of the keys (K, size), computed for all of them at once: a table of the network."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    index = np.arange(1 << 2 * int(half), dtype=np.uint64)
    left, right = index >> half, index & mask
    for rounds in zip(*(np.random.SeedSequence(key).generate_state(8, np.uint64) for key in keys)):
        left, right = right, left ^ (_mix(right ^ np.array(rounds)[:, None]) & mask)
    table = (left << half | right).astype(np.int64)
    orders = table[:, :size]
    while (orders >= size).any():
        orders = np.where(orders < size, orders, np.take_along_axis(table, orders, axis=1))
    return orders


@pytest.mark.parametrize("size", [5, 12, 100])
def test_permute_shuffles(size):
    """Every element goes everywhere equally often, and neighbours separate: chi-square over 6,000 keys."""
    from scipy.stats import chisquare

    orders = permutations(size, range(6000))
    for key in range(200):
        assert np.array_equal(orders[key], permute(np.arange(size), size, key))
    where = [np.bincount(places, minlength=size) for places in orders.T]
    steps = np.bincount((orders[:, 1] - orders[:, 0]) % size, minlength=size)
    assert chisquare(np.ravel(where)).pvalue > 1e-4
    assert steps[0] == 0 and chisquare(steps[1:]).pvalue > 1e-4


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(2, 400), block=st.integers(1, 50), seed=st.integers(0, 1000))
def test_an_epoch_visits_separate_windows_once(tokens, block, seed):
    if tokens <= block:
        return
    order = TrainingOrder(tokens, block, seed)
    for epoch in range(3):
        starts = np.sort(order.starts(epoch * order.per_epoch, order.per_epoch))
        assert starts[0] >= 0 and starts[-1] + block + 1 <= tokens
        assert (np.diff(starts) == block).all()
        assert order.per_epoch * block > tokens - 1 - 2 * block  # less than two blocks are unused


def test_the_order_is_a_function_of_seed_and_count():
    order = TrainingOrder(10_000, 16, seed=3)
    whole = order.starts(0, 2000)
    pieces = np.concatenate([order.starts(0, 700), order.starts(700, 1), order.starts(701, 1299)])
    assert np.array_equal(whole, pieces)
    assert not np.array_equal(whole, TrainingOrder(10_000, 16, seed=4).starts(0, 2000))
    epoch_1, epoch_2 = whole[: order.per_epoch], whole[order.per_epoch : 2 * order.per_epoch]
    assert not np.array_equal(epoch_1 - epoch_1.min(), epoch_2 - epoch_2.min())  # another order
    offsets = {order.starts(e * order.per_epoch, 1)[0] % 16 for e in range(50)}
    assert len(offsets) > 10  # and other offsets


def sums_files(tmp_path, count):
    write_tokens(tmp_path / "val.bin", np.arange(count) % 251, 251)
    return Split([TokenFiles(tmp_path, "val")], [1.0])


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 300), block=st.integers(1, 40), size=st.integers(1, 7), ranks=st.integers(1, 3))
def test_the_whole_split_predicts_every_token_except_the_first_once(tmp_path_factory, count, block, size, ranks):
    files = sums_files(tmp_path_factory.mktemp("val"), count)
    starts = evaluation_starts(count, block, 0)
    predicted, lengths = [], []
    for rank in range(ranks):
        batches = list(evaluation_batches(files, starts, size, block, rank, ranks))
        lengths.append(len(batches))
        for tokens, targets in batches:
            assert tokens.shape == targets.shape == (size, block)
            scored = targets >= 0
            assert ((tokens + 1) % 251)[scored].tolist() == targets[scored].tolist()
            predicted += targets[scored].tolist()
    assert len(set(lengths)) == 1  # otherwise processes would wait for each other forever
    assert sorted(predicted) == sorted(i % 251 for i in range(1, count))


def test_a_few_windows_are_fixed_and_evenly_spread():
    starts = evaluation_starts(10_001, 100, 21)
    assert starts[0] == 0 and starts[-1] == 9_900 and set(np.diff(starts)) == {495}
    assert np.array_equal(evaluation_starts(1000, 100, 50), np.arange(0, 999, 100))


def test_windows_hold_tokens_and_their_successors(tmp_path):
    files = sums_files(tmp_path, 100)
    tokens, targets = windows(files, np.array([0, 90]), 8)
    assert tokens.tolist() == [list(range(8)), list(range(90, 98))]
    assert torch.equal(targets, tokens + 1)
    assert tokens.dtype == targets.dtype == torch.int64


def resident_anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


@pytest.mark.slow
def test_resident_memory_stays_flat_over_ten_thousand_steps(tmp_path):
    write_tokens(tmp_path / "train.bin", np.arange(4_000_000) % 50_000, 50_000)
    files = Split([TokenFiles(tmp_path, "train")], [1.0])
    order = files.training_order(64, 0)

    def run(steps):
        for step in steps:
            for _ in evaluation_batches(files, order.starts(4 * step, 4), 4, 64):
                pass

    run(range(500))
    before = resident_anonymous()
    run(range(500, 10_500))
    assert resident_anonymous() <= 1.02 * before


def mixture(tmp_path, sizes, weights):
    """A split of several datasets; each dataset's tokens are all its own number."""
    for i, size in enumerate(sizes):
        (tmp_path / str(i)).mkdir(exist_ok=True)
        write_tokens(tmp_path / str(i) / "train.bin", np.full(size, i), 100)
    total = sum(weights)
    return Split([TokenFiles(tmp_path / str(i), "train") for i in range(len(sizes))], [w / total for w in weights])


def test_a_mixture_gives_every_dataset_its_share(tmp_path):
    """GPT-3's five weights, which sum to 101, over 100,000 windows, and over stretches of 10,000."""
    weights = [60, 22, 8, 8, 3]
    split = mixture(tmp_path, [40_000, 3000, 1200, 700, 300], weights)
    starts = split.training_order(16, seed=5).starts(0, 100_000)
    sources = np.searchsorted(split.bounds, starts, side="right") - 1
    share = np.bincount(sources) / 100_000
    assert abs(share - np.array(weights) / 101).max() < 0.0005  # a twentieth of a percentage point
    for start in (0, 1000, 54_321):
        nearby = np.bincount(sources[start : start + 10_000]) / 10_000
        assert abs(nearby - np.array(weights) / 101).max() < 0.02
    tokens, targets = windows(split, starts[:3000], 16)
    assert (tokens == torch.from_numpy(sources[:3000])[:, None]).all() and torch.equal(tokens, targets)


def test_a_mixture_is_a_function_of_seed_and_count_and_reads_each_dataset_in_order(tmp_path):
    split = mixture(tmp_path, [5000, 900, 333], [2, 1, 1])
    order = split.training_order(16, seed=5)
    whole = order.starts(0, 20_000)
    pieces = np.concatenate([order.starts(0, 4095), order.starts(4095, 2), order.starts(4097, 15_903)])
    assert np.array_equal(whole, pieces)
    assert not np.array_equal(whole, split.training_order(16, seed=6).starts(0, 20_000))
    sources = np.searchsorted(split.bounds, whole, side="right") - 1
    assert not np.array_equal(sources[: order.CYCLE], sources[order.CYCLE : 2 * order.CYCLE])  # another order
    for source, dataset_order in enumerate(order.orders):
        starts = whole[sources == source] - split.bounds[source]
        assert starts.min() >= 0 and starts.max() + 17 <= len(split.parts[source])
        # after any number of cycles, the windows drawn are consecutive places in the dataset's own order
        cycles = 4 * order.CYCLE
        drawn = np.sort(whole[:cycles][sources[:cycles] == source]) - split.bounds[source]
        assert np.array_equal(drawn, np.sort(dataset_order.starts(0, len(drawn))))


def test_each_dataset_of_a_mixture_has_its_own_order(tmp_path):
    first, second = mixture(tmp_path, [5000, 5000], [1, 1]).training_order(16, seed=5).orders
    assert not np.array_equal(first.starts(0, 100), second.starts(0, 100))


def test_evaluation_of_a_mixture_stays_within_each_dataset(tmp_path):
    split = mixture(tmp_path, [503, 307, 99], [6, 3, 1])
    starts = split.evaluation_starts(16, 20)
    assert np.bincount(np.searchsorted(split.bounds, starts, side="right") - 1).tolist() == [12, 6, 2]
    scored = 0
    for tokens, targets in evaluation_batches(split, split.evaluation_starts(16, 0), 4, 16):
        counts = targets >= 0
        assert torch.equal(tokens[counts], targets[counts])  # no window runs on into the next dataset
        scored += int(counts.sum())
    assert scored == 503 + 307 + 99 - 3


def test_a_share_below_a_4096th_is_refused(tmp_path):
    with pytest.raises(UserError, match="less than a 4096th"):
        mixture(tmp_path, [100, 100], [1, 100_000]).training_order(16, 0)


def test_a_separator_begins_its_document(tmp_path):
    write_tokens(tmp_path / "train.bin", np.array([5, 6, 9, 7, 9, 9, 8, 1, 2]), 10)
    split = Split([TokenFiles(tmp_path, "train")], [1.0], separator=9)
    ((tokens, targets, documents),) = evaluation_batches(split, np.array([0]), 1, 8)
    assert tokens.tolist() == [[5, 6, 9, 7, 9, 9, 8, 1]] and targets.tolist() == [[6, 9, 7, 9, 9, 8, 1, 2]]
    assert documents.tolist() == [[0, 0, 1, 1, 2, 3, 3, 3]]


def test_datasets_of_a_mixture_must_share_a_tokenizer_and_documents_need_a_separator(tmp_path):
    for name, characters in (("a", "xy"), ("b", "xy"), ("c", "xz")):
        write_dataset(tmp_path / name, CharTokenizer(characters), {"train": np.zeros(9, int)})

    def corpus(*names):
        return open_corpus([Source(str(tmp_path / name), 2.0) for name in names])

    assert corpus("a", "b").weights == (0.5, 0.5)
    assert corpus("a", "nowhere") is None
    with pytest.raises(
        UserError, match="c and .*a have different tokenizers: the datasets of a mixture must share one"
    ):
        corpus("a", "b", "c")
    with pytest.raises(UserError, match="document_mask = true needs an end-of-text token between documents"):
        corpus("a").split("train", 4, 2, document_mask=True)


def test_another_dataset_s_tokenizer_is_refused(tmp_path):
    """Without a manifest, as older versions wrote datasets."""
    for name, characters in (("a", "xy"), ("b", "xyz")):
        write_dataset(tmp_path / name, CharTokenizer(characters), {"train": np.zeros(9, int)})
    shutil.copy(tmp_path / "b" / "tokenizer.json", tmp_path / "a")
    (tmp_path / "b" / "meta.json").unlink()  # others' shards have none
    assert open_corpus([Source(str(tmp_path / "b"), 1.0)]).tokenizer.vocab_size == 3
    with pytest.raises(UserError, match="a belongs to another dataset: it has 3 tokens, and meta.json .* records 2"):
        open_corpus([Source(str(tmp_path / "a"), 1.0)])


def test_a_missing_shard_is_refused(tmp_path):
    tokenizer = CharTokenizer("ab")
    write_dataset(tmp_path / "d", tokenizer, {"train": np.zeros(90, int), "val": np.zeros(80, int)})
    write_tokens(tmp_path / "d" / "train_000001.bin", np.zeros(50, int), 2)
    corpus = open_corpus([Source(str(tmp_path / "d"), 1.0)])
    with pytest.raises(
        UserError, match="140 tokens in its train split, its meta.json counts 90: a token file is missing"
    ):
        corpus.split("train", 8, 2, False)
    assert len(corpus.split("val", 8, 2, False)) == 80


class Counting:
    """A split whose token i is i."""

    separator = masking = None

    def read(self, start, count):
        return np.arange(start, start + count)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_training_batches_are_slices_of_one_order(ranks):
    order = TrainingOrder(10_000, 8, seed=3)
    of_ranks = [training_batches(Counting(), order, 24, 8, 2, 8, rank, ranks) for rank in range(ranks)]
    steps = 2
    micro_batches = [
        [next(batches)[0][:, 0] for _ in range(8 // 2 // ranks)] for _ in range(steps) for batches in of_ranks
    ]
    starts_read = torch.cat([starts for batches in micro_batches for starts in batches])
    assert starts_read.tolist() == order.starts(24, 8 * steps).tolist()


def test_one_batch_is_read_ahead_in_another_thread():
    read, threads = [], set()

    def numbers():
        for number in range(4):
            read.append(number)
            threads.add(threading.get_ident())
            yield (torch.tensor(number),)

    yielded = []
    for (number,) in prefetch(numbers(), torch.device("cpu")):
        yielded.append(number.item())
    assert yielded == read == [0, 1, 2, 3] and threads and threading.get_ident() not in threads
    batches = prefetch(numbers(), torch.device("cpu"))
    read.clear()
    next(batches)
    batches.close()
    assert len(read) <= 2


def test_the_pinning_thread_uses_its_process_s_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append((threading.get_ident(), device)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append((threading.get_ident(), "pinned")) or x)
    device = torch.device("cuda", 3)
    (batch,) = prefetch(iter([(torch.ones(2), torch.ones(2))]), device)
    assert len(batch) == 2
    (chose, chosen), *pinned = calls
    assert chosen == device and pinned == [(chose, "pinned")] * 2 and chose != threading.get_ident()


def test_errors_while_reading_ahead_are_raised():
    def failing():
        yield (torch.zeros(1),)
        raise OSError("the disk is gone")

    evaluation_batches = prefetch(failing(), torch.device("cpu"))
    next(evaluation_batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(evaluation_batches)


# ---- files that change while they are read


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def replace(path):
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def overwrite(path):
    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**6))  # file systems with coarse times


@pytest.mark.parametrize("change", [truncate, replace, overwrite])
def test_a_file_that_changes_while_in_use_is_refused(tmp_path, change):
    for shard in (0, 1):
        write_tokens(tmp_path / f"train_{shard}.bin", np.arange(100), 1000)
    files = TokenFiles(tmp_path, "train")
    assert files.read(90, 40).tolist() == [*range(90, 100), *range(30)]
    change(tmp_path / "train_1.bin")
    assert files.read(0, 100).tolist() == list(range(100))
    for start, count in ((90, 40), (150, 10), (195, 17)):
        with pytest.raises(UserError, match="train_1.bin was changed or replaced while it was in use"):
            files.read(start, count)
    with pytest.raises(UserError, match="train_1.bin was changed"):
        windows(files, np.array([0, 110]), 8)


def test_what_one_call_of_the_system_can_not_read_is_read_in_several(tmp_path, monkeypatch):
    write_tokens(tmp_path / "train.bin", np.arange(5000), 5000)
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, offset: original(file, min(count, 1000), offset))
    assert TokenFiles(tmp_path, "train").read(0, 5000).tolist() == list(range(5000))


def test_documents_of_an_older_dataset_are_separated_as_they_were(tmp_path):
    """Older versions took <|endoftext|> where a model declares another end; datasets without a manifest are theirs."""
    tokenizer = BPETokenizer.train(["aa ab ba bb"], 258)
    tokenizer.end_of_text = 7  # as a model's files may declare
    corpus = Corpus(("a",), (tmp_path,), (1.0,), tokenizer)
    assert corpus.separator() == tokenizer.special["<|endoftext|>"] != 7
    record_files(tmp_path)
    assert corpus.separator() == 7


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fineweb", "python prepare/fineweb.py"),
        ("shapes_text", "python prepare/shapes.py"),
        ("long_64", "ONLY=data bash examples/long_context_arc.sh"),
        ("diary", "python prepare/text.py --input FILE_OR_FOLDER --name diary --tokenizer gpt2"),
    ],
)
def test_a_dataset_that_is_missing_is_named_with_the_command_that_makes_it(name, command):
    with pytest.raises(UserError) as refused:
        prepare_dataset(name)
    assert f"prepare it with `{command}`" in str(refused.value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_make_the_datasets_that_messages_send_to_them_for(name):
    example = ROOT / "examples" / EXAMPLES[name]
    stems = "_".join(EXAMPLES[name].split("_")[:-1])
    sources = [example, *example.parent.glob(f"{stems}*.py")]
    assert any(name in source.read_text() for source in sources)
    assert example.read_text().index("ONLY:-") < example.read_text().index("/train.py")
