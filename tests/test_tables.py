"""Numbers as text."""

import pytest

from gpt_arc.tables import counted, duration, markdown


@pytest.mark.parametrize(
    ("number", "form", "text"),
    [
        (0, ",", "0 pairs"),
        (1, ",", "1 pair"),
        (1200, ",", "1,200 pairs"),
        (1.0001, ".3g", "1 pair"),
        (0.5, ".3g", "0.5 pairs"),
    ],
)
def test_a_count_has_its_noun_in_the_right_number(number, form, text):
    assert counted(number, "pair", form) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 seconds"),
        (1, "1 second"),
        (119, "119 seconds"),
        (150, "2.5 minutes"),
        (7_100, "118 minutes"),
        (36_000, "10 hours"),
        (86_400 * 1_200, "1,200 days"),
    ],
)
def test_a_time_has_the_largest_unit_that_it_has_two_of(seconds, text):
    assert duration(seconds) == text


def test_rows_are_a_markdown_table_whose_first_is_the_head():
    assert markdown([["model", "loss"], ["dense", "1.78"]]) == "| model | loss |\n|---|---|\n| dense | 1.78 |"
