"""Which recipe a text gets, and how much of it is read."""

import pytest

from gpt_arc.files import resource
from gpt_arc.training.config import build_config, read_settings
from gpt_arc.training.recipes import RECIPES, choose, tokenizer_for

SLOW = {"ngrams": 80_000, "middle": 25_000, "deep": 10_000}  # tokens per second
FAST = {"ngrams": 2_000_000, "middle": 1_500_000, "deep": 1_000_000}


def tokens(settings):
    return settings["max_iters"] * settings["batch_size"] * settings["block_size"]


@pytest.mark.parametrize("name, minutes", [("ngrams", 0.1), ("middle", 2), ("deep", 5)])
def test_a_recipe_is_a_config_that_can_be_trained(name, minutes):
    chosen, settings = choose(900_000, 100_000, SLOW, minutes)
    assert chosen == name
    preset = read_settings(resource(f"configs/{RECIPES[name].config}.toml"))
    assert build_config(preset | settings, name).sequences_per_step == settings["batch_size"]


@pytest.mark.parametrize(
    "characters, rates, minutes, expected",
    [
        (1_000_000, SLOW, 0.5, "ngrams"),
        (1_000_000, SLOW, 2, "middle"),
        (1_000_000, SLOW, 5, "deep"),
        (1_000_000, FAST, 2, "deep"),
        (50_000_000, SLOW, 2, "middle"),
        (20_000, FAST, 60, "ngrams"),
    ],
)
def test_the_deeper_model_is_for_enough_text_and_time(characters, rates, minutes, expected):
    assert choose(characters * 9 // 10, characters // 10, rates, minutes)[0] == expected


@pytest.mark.parametrize("train", [700, 18_000, 900_000, 45_000_000])
@pytest.mark.parametrize("minutes", [0.01, 1, 10, 1000])
@pytest.mark.parametrize("rates", [SLOW, FAST])
def test_neither_the_time_nor_the_epochs_are_exceeded(train, minutes, rates):
    name, settings = choose(train, train // 9, rates, minutes)
    batch = settings["batch_size"] * settings["block_size"]
    limit = min(rates[name] * 60 * minutes, RECIPES[name].most_epochs * train)
    assert limit - batch < tokens(settings) <= max(limit, batch)


def test_more_minutes_of_a_recipe_read_more():
    read = [tokens(choose(45_000_000, 5_000_000, SLOW, minutes)[1]) for minutes in (0.05, 0.1, 0.5)]
    assert read[0] < read[1] < read[2]


@pytest.mark.parametrize(
    "train, rate", [(18_000, 0.037), (200 * 24 * 64 / 1.5 + 1, 0.02), (2_048_001, 0.02), (1_000, 0.04)]
)
def test_the_rate_of_n_grams_follows_from_the_steps(train, rate):
    name, settings = choose(int(train), 2_000, {"ngrams": 80_000, "middle": 1, "deep": 1}, 10)
    assert name == "ngrams" and settings["muon_rate"] == pytest.approx(rate, rel=0.02)


def test_windows_fit_into_a_very_short_text():
    settings = choose(270, 30, SLOW, 1)[1]
    assert settings["block_size"] == 29 and settings["max_iters"] == 1


def test_an_evaluation_reads_a_part_of_a_long_val_split():
    assert choose(900_000, 100_000, SLOW, 1)[1]["eval_iters"] == 0
    settings = choose(45_000_000, 5_000_000, SLOW, 1)[1]
    assert 90_000 < settings["eval_iters"] * settings["batch_size"] * settings["block_size"] <= 100_000


def test_few_characters_are_the_tokens():
    assert tokenizer_for(65) == tokenizer_for(4000) == "char" and tokenizer_for(20_000) == "gpt2"
