"""Detokenizers against hand-written running text."""

import pytest

from gpt_arc.evaluation.detokenize import DETOKENIZERS, penn_treebank, wikitext

WIKITEXT = {
    " = Robert Boulter = \n": " = Robert Boulter = \n",
    " = = Career = = \n": " ==Career== \n",
    " = = = 2000 – 2005 = = = \n": " ===2000 – 2005=== \n",
    " = = = = Short stories = = = = \n": " ====Short stories==== \n",
    " Boulter starred in two films in 2008 , and in 1 @,@ 500 others .": (
        " Boulter starred in two films in 2008, and in 1,500 others."
    ),
    "the half @-@ hour show drew 3 @.@ 5 million": "the half-hour show drew 3.5 million",
    "a role ( written by Stephens ) ; it was 2 % shorter": "a role (written by Stephens); it was 2% shorter",
    'He had a role in " Scott Parry " and " Herons " .': 'He had a role in "Scott Parry" and "Herons".',
    "Boulter 's films , and they 've [ sic ] sailors ' boats": "Boulter's films, and they've [sic] sailors' boats",
    "What ? Stop ! As follows : a": "What? Stop! As follows: a",
}
PENN_TREEBANK = {
    " no it was n't black monday \n": " no it wasn't black monday \n",
    " the company 's sales rose N % to $ N million \n": " the company's sales rose N% to $N million \n",
    " we 're sure they 'll say <unk> is n't theirs \n": " we're sure they'll say <unk> isn't theirs \n",
    " the investors ' money and mr. <unk> 's \n": " the investors' money and mr. <unk>'s \n",
}


@pytest.mark.parametrize("line", WIKITEXT)
def test_wikitext_becomes_running_text(line):
    assert wikitext(line) == WIKITEXT[line]


@pytest.mark.parametrize("line", PENN_TREEBANK)
def test_the_penn_treebank_becomes_running_text(line):
    assert penn_treebank(line) == PENN_TREEBANK[line]


@pytest.mark.parametrize(("name", "lines"), [("wikitext", WIKITEXT), ("ptb", PENN_TREEBANK)])
def test_lines_are_independent(name, lines):
    assert DETOKENIZERS[name]("\n".join(lines)) == "\n".join(lines.values())


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_running_text_stays_as_it_is(name):
    text = "It's \"plain\" text (really), isn't it? 3.5 % of 1,500:\nnone.\n".replace(" %", "%")
    assert DETOKENIZERS[name](text) == text and DETOKENIZERS[name]("") == ""


def test_none_keeps_the_separated_words():
    text = "\n".join([*WIKITEXT, *PENN_TREEBANK])
    assert DETOKENIZERS["none"](text) == text
