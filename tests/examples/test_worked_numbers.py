"""The figures of examples/worked_numbers.py, and its exit code when a function computes another one."""

import sys

import pytest

import worked_numbers


@pytest.mark.parametrize("section", worked_numbers.SECTIONS.values(), ids=worked_numbers.SECTIONS)
def test_every_figure_is_what_the_program_computes(section):
    for row in section():
        assert row.holds, row


def test_another_figure_ends_the_script_with_1(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["worked_numbers.py"])
    monkeypatch.setattr(worked_numbers, "SECTIONS", {"Losses": worked_numbers.losses})
    assert worked_numbers.main() == 0
    assert capsys.readouterr().out.endswith("19 of 19 figures are right\n")
    monkeypatch.setattr(worked_numbers, "combined", lambda task, language: 1.672)
    assert worked_numbers.main() == 1
    output = capsys.readouterr().out
    assert "with a class of .85: L2 + .5 L1: combined_loss computes 1.6720, not 1.6714" in output
    assert output.endswith("17 of 19 figures are right\n")


def test_a_figure_holds_to_half_of_its_last_digit():
    row = worked_numbers.Row("", "", (0.41, -3), (0.4149, -3.0), "")
    assert row.holds and not row._replace(computed=(0.4151, -3)).holds
    assert not row._replace(computed=(0.41,)).holds and not row._replace(computed=(0.41, -2)).holds
