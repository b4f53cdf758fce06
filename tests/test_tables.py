"""Numbers as text."""

import pytest

from gpt_arc.tables import counted


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
