"""Which recipe a text gets, and how much of it is read."""

import pytest

from gpt_arc.files import resource
from gpt_arc.training.config import read_settings
from gpt_arc.training.recipes import RECIPES, choose, tokenizer_for

SLOW = {"speedrun_cpu": 80_000, "speedrun": 10_000}  # tokens per second of two quiet cores
FAST = {"speedrun_cpu": 2_000_000, "speedrun": 1_000_000}


def tokens(name, settings):
    return settings["max_iters"] * RECIPES[name].batch_size * settings["block_size"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_config_with_its_batches(name):
    settings = read_settings(resource(f"configs/{name}.toml"))
    assert (settings["batch_size"], settings["block_size"]) == (RECIPES[name].batch_size, RECIPES[name].block_size)


@pytest.mark.parametrize(
    "characters, rates, minutes, expected",
    [
        (1_000_000, SLOW, 2, "speedrun_cpu"),
        (1_000_000, SLOW, 5, "speedrun"),
        (1_000_000, FAST, 2, "speedrun"),
        (50_000_000, SLOW, 2, "speedrun_cpu"),
        (20_000, FAST, 60, "speedrun_cpu"),
    ],
)
def test_the_deeper_model_is_for_enough_text_and_time(characters, rates, minutes, expected):
    assert choose(characters * 9 // 10, characters // 10, rates, minutes)[0] == expected


@pytest.mark.parametrize("train", [700, 18_000, 900_000, 45_000_000])
@pytest.mark.parametrize("minutes", [0.01, 1, 10, 1000])
@pytest.mark.parametrize("rates", [SLOW, FAST])
def test_neither_the_time_nor_the_epochs_are_exceeded(train, minutes, rates):
    name, settings = choose(train, train // 9, rates, minutes)
    batch = RECIPES[name].batch_size * settings["block_size"]
    limit = min(rates[name] * 60 * minutes, RECIPES[name].most_epochs * train)
    assert limit - batch < tokens(name, settings) <= max(limit, batch)


def test_more_minutes_read_more():
    read = [tokens(*choose(45_000_000, 5_000_000, SLOW, minutes)) for minutes in (0.1, 0.5, 2)]
    assert read[0] < read[1] < read[2]


def test_windows_fit_into_a_very_short_text():
    name, settings = choose(270, 30, SLOW, 1)
    assert settings["block_size"] == 29 and settings["max_iters"] == 1


def test_an_evaluation_reads_a_part_of_a_long_val_split():
    assert choose(900_000, 100_000, SLOW, 1)[1]["eval_iters"] == 0
    name, settings = choose(45_000_000, 5_000_000, SLOW, 1)
    assert 90_000 < settings["eval_iters"] * RECIPES[name].batch_size * settings["block_size"] <= 100_000


def test_few_characters_are_the_tokens():
    assert tokenizer_for(65) == "char" and tokenizer_for(4000) == "gpt2"
