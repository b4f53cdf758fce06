"""How many threads a run uses, and that a resumed run uses as many."""

from pathlib import Path

import pytest
import torch

import train
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.load import set_decoding_threads
from gpt_arc.training import threads
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.config import Config, TrainingConfig
from helpers import TINY_FLAGS, assert_same_weights, interrupt_at, write
from model import GPT, GPTConfig
from policy_tree import save_chat_model
from ranked_texts import CHAT, tiny_config
from stages import sft

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    """A machine of four cores whose user has set no number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


@pytest.fixture
def resolve(monkeypatch):
    """Resolves the setting where a step takes as long as `seconds` says for each number of threads."""

    def call(setting="auto", saved=None, device=CPU, flops=1e6, seconds=None, batch=4):
        def timer(config, sequences, *others):
            assert seconds, "nothing is to be measured"
            assert sequences == batch
            return seconds.__getitem__

        monkeypatch.setattr(threads, "step_timer", timer)
        config = Config(training=TrainingConfig(threads=setting))  # with sequences of 1024 tokens
        return threads.resolve_threads(config, saved, 4, flops, device, "float32")

    return call


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ({1: 1.0, 2: 10.0}, 1),  # busy cores
        ({1: 1.0, 2: 0.95}, 1),  # hardly faster
        ({1: 1.0, 2: 0.6, 4: 0.58}, 2),
        ({1: 1.0, 2: 0.6, 4: 0.4}, 4),
    ],
)
def test_threads_are_doubled_while_a_step_gets_a_tenth_faster(resolve, seconds, expected):
    assert resolve(seconds=seconds) == expected


def test_what_is_measured_is_built_with_one_thread(monkeypatch):
    events = []
    monkeypatch.setattr(torch, "set_num_threads", events.append)
    threads.choose_threads("auto", CPU, False, lambda: events.append("built") or {1: 1.0, 2: 2.0}.__getitem__)
    assert events == [1, "built"]


@pytest.mark.parametrize(("product_with_two", "expected", "steps"), [(0.95, 1, [1]), (0.5, 2, [1, 2, 4])])
def test_a_step_is_tried_with_more_threads_only_where_they_speed_up_a_product(
    monkeypatch, product_with_two, expected, steps
):
    """On busy cores one step with two threads can take longer than the whole measurement should."""
    measured = []

    def mean_time(work, count, least):
        if work is not step:
            return {1: 1.0, 2: product_with_two, 4: 0.3}[count]
        measured.append(count)
        return {1: 1.0, 2: 0.6, 4: 0.58}[count]

    def step():
        pass

    monkeypatch.setattr(threads, "mean_time", mean_time)
    assert threads.choose_threads("auto", CPU, False, lambda: threads.timed(step)) == expected
    assert measured == steps


def test_a_number_of_threads_that_no_doubling_reaches_is_tried_too(resolve, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert resolve(seconds={1: 1.0, 2: 0.6, 3: 0.4}) == 3


def test_a_large_batch_is_measured_in_part(resolve):
    assert resolve(flops=8e6, seconds={1: 1.0, 2: 1.0}, batch=2) == 1
    assert resolve(flops=4e7, seconds={1: 1.0, 2: 1.0}, batch=1) == 1


def test_what_is_set_recorded_or_large_is_not_measured(resolve, monkeypatch):
    assert resolve(setting=3, saved=2) == 3
    assert resolve(saved=1) == 1
    assert resolve(flops=1e8) == 4
    assert resolve(device=torch.device("cuda")) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert resolve() == 4 and resolve(saved=1) == 4 and resolve(setting=2) == 2


def test_the_timer_measures_steps_with_as_many_threads_as_it_is_given(monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(threads, "MEASURED_FOR", 0.01)
    monkeypatch.setattr(threads, "WORTHWHILE", float("inf"))
    config = Config(model=GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8))
    seconds_with = threads.step_timer(config, 2, CPU, "float32")
    assert 0 < seconds_with(1) < 1 and 0 < seconds_with(2) < 1
    assert counts == [1, 1, 2, 2]  # a step with 1; products with 1 and 2, and a step with 2


def test_a_resumed_run_has_the_number_it_began_with(workplace, stage_runner, monkeypatch):
    counts = [1]
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    stage_runner(train, "sums.toml", *TINY_FLAGS, "--max_iters=4", "--threads=2")
    assert load_state(Path("out/sums/last"))["runtime"]["threads"] == 2
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    counts.append(4)
    stage_runner(train, "--resume=out/sums", "--max_iters=8", "--threads=auto")
    assert load_state(Path("out/sums/last"))["runtime"]["threads"] == 2


def test_a_stage_measures_once_and_resumes_with_its_number(tmp_path, monkeypatch, stage_runner):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_chat_model(GPT(tiny_config(n_layer=1)), CHAT, "base")
    write("chats.jsonl", [{"prompt": "ab", "response": "c"}] * 8)
    flags = ("base", "--train=chats.jsonl", "--val_fraction=0", "--batch_size=4", "--device=cpu", "--dtype=float32")
    counts, measured = [4], []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)

    def timer(config, *others):
        measured.append(config.model)
        torch.rand(3)  # a measurement may draw random numbers
        return {1: 1.0, 2: 0.6, 4: 0.6}.__getitem__

    monkeypatch.setattr(threads, "step_timer", timer)
    stage_runner(sft, *flags, "--epochs=2", "--out_dir=whole")
    assert len(measured) == 1 and load_state(Path("whole/last"))["runtime"]["threads"] == 2
    counts.append(4)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert stage_runner(sft, *flags, "--epochs=2", "--out_dir=halves", "--threads=2").code == 130
    counts.append(4)
    stage_runner(sft, "--resume=halves")
    assert len(measured) == 1 and load_state(Path("halves/last"))["runtime"]["threads"] == 2
    assert_same_weights("whole/last", "halves/last")


def test_decoding_and_evaluation_measure_what_they_do(monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    model = GPT(tiny_config(n_layer=1)).eval()
    monkeypatch.setattr(threads, "MEASURED_FOR", 0.01)
    threads.set_reading_threads("auto", model, 64)
    set_decoding_threads(Decoder(model), "auto", 3)
    assert counts.count(1) >= 2 and counts.count(2) >= 2 and counts[-1] in (1, 2, 4)
    threads.set_reading_threads(3, model, 64)
    assert counts[-1] == 3
    set_decoding_threads(Decoder(model), 2, 3)
    assert counts[-1] == 2
    decoder = Decoder(model)
    decoder.compiled = "blocks"
    set_decoding_threads(decoder, "auto", 1)
    assert counts[-1] == 4  # nothing is measured
