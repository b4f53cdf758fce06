"""Task files, the questions made from items, demonstrations, arithmetic, and two statistics."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gpt_arc.errors import UserError
from gpt_arc.evaluation.items import arithmetic, demonstrations, load_items, prepared_items
from gpt_arc.evaluation.statistics import paired_p_value, standard_error
from gpt_arc.evaluation.tasks import Question, Task, filled, known_tasks, load_task, looked_up

ADDITION = {"a": 48, "b": 76, "operation": "plus", "value": 124}
SUBTRACTION = {"a": 34, "b": 53, "operation": "minus", "value": -19}
CBT = {
    "sentences": ["This vexed the king , who did n't smile .", "`` Oh ! '' he said -LRB- twice -RRB- ."],
    "question": "`` They are old , '' said the XXXXX ; `` and were nice to me , the queen 's . ''",
    "answer": "king",
    "options": ["aunt", "boy", "cat", "day", "eye", "fox", "girl", "hat", "ink", "king"],
}
CBT_BEFORE = 'This vexed the king, who didn\'t smile. "Oh!" he said (twice). "They are old," said the '
PAIR = {"translation": {"en": "The cat sleeps.", "fr": "Le chat dort."}}
WINOGRAD = {
    "text": "The councilmen refused the  demonstrators a permit because they feared it.",
    "pronoun": "they",
    "pronoun_loc": 59,
    "quote": "they feared it",
    "quote_loc": 59,
    "options": ["The councilmen", "The demonstrators"],
    "label": 0,
    "source": "(Winograd 1972)",
}
# per task: an item with the data set's columns, the right context and continuation, and the number of options
SHIPPED = {
    "addition_2": (ADDITION, "Q: What is 48 plus 76?\nA:", " 124\n", 1),
    "addition_3": (ADDITION, "Q: What is 48 plus 76?\nA:", " 124\n", 1),
    "subtraction_2": (SUBTRACTION, "Q: What is 34 minus 53?\nA:", " -19\n", 1),
    "subtraction_3": (SUBTRACTION, "Q: What is 34 minus 53?\nA:", " -19\n", 1),
    "arc_easy": (
        {
            "id": "Mercury_417466",
            "question": "Which is a source of energy?",
            "choices": {"text": ["a rock", "the Sun", "a cup", "sand"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        "Question: Which is a source of energy?\nAnswer:",
        " the Sun",
        4,
    ),
    "hellaswag": (
        {
            "ind": 24,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he",
            "endings": ["sings.", "swims.", "flies.", "starts pulling up roofing."],
            "source_id": "activitynet~v_-JhWjGDPHMY",
            "split": "val",
            "split_type": "indomain",
            "label": "3",
        },
        "Roof shingle removal: A man is sitting on a roof. he",
        " starts pulling up roofing.",
        4,
    ),
    "lambada": (
        {"text": "He knew who was there: it had to be\nhis old friend Gabriel"},
        "He knew who was there: it had to be\nhis old friend",
        " Gabriel",
        1,
    ),
    "piqa": (
        {"goal": "To soften butter", "sol1": "Freeze it.", "sol2": "Warm it.", "label": 1},
        "Question: To soften butter\nAnswer:",
        " Warm it.",
        2,
    ),
    "race": (
        {
            "example_id": "high132.txt",
            "article": "Last week I met Mr. Li.",
            "answer": "C",
            "question": "The writer met   _  .",
            "options": ["nobody", "a dog", "Mr. Li", "his aunt"],
        },
        "Last week I met Mr. Li.\nQuestion: The writer met   _  .\nAnswer:",
        " Mr. Li",
        4,
    ),
    "rte": (
        {"sentence1": "No weapons were found.", "sentence2": "Weapons were found.", "label": 1, "idx": 0},
        "No weapons were found.\nquestion: Weapons were found. True or False?\nanswer:",
        " False",
        2,
    ),
    "sst2": (
        {"idx": 0, "sentence": "it 's a charming journey . ", "label": 1},
        "Review: it 's a charming journey . \nSentiment:",
        " positive",
        2,
    ),
    "winogrande": (
        {
            "sentence": "Sarah was a better surgeon than Maria so _ got the easier cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
        "Sarah was a better surgeon than Maria so Maria",
        " got the easier cases.",
        2,
    ),
    "arc_challenge": (
        {
            "id": "Mercury_7175875",
            "question": "How will the length of a day change?",
            "choices": {"text": ["shorter", "longer", "1", "B"], "label": ["1", "2", "3", "4"]},
            "answerKey": "2",
        },
        "Question: How will the length of a day change?\nAnswer:",
        " longer",
        4,
    ),
    "boolq": (
        {"question": "is it warm there", "passage": "The sun shines.", "idx": 3, "label": 1},
        "The sun shines.\nquestion: is it warm there?\nanswer:",
        " yes",
        2,
    ),
    "cbt_cn": (CBT, CBT_BEFORE, 'king; "and were nice to me, the queen\'s."', 10),
    "cbt_ne": (CBT, CBT_BEFORE, 'king; "and were nice to me, the queen\'s."', 10),
    "cnn_dailymail": (
        {"article": "It rained. It stopped.", "highlights": "Rain .\nThen none .", "id": "42c0"},
        "It rained. It stopped.\nTL;DR:",
        " Rain .\nThen none .",
        1,
    ),
    "copa": (
        {
            "premise": "My body cast a shadow over the grass.",
            "choice1": "The sun was rising.",
            "choice2": "The grass was cut.",
            "question": "cause",
            "idx": 0,
            "label": 0,
        },
        "My body cast a shadow over the grass because",
        " the sun was rising.",
        2,
    ),
    "lambada_filtered": (
        {"text": "He knew who was there: his old friend Gabriel"},
        "He knew who was there: his old friend",
        " Gabriel",
        1,
    ),
    "wmt14_en_fr": (PAIR, "The cat sleeps. =", " Le chat dort.", 1),
    "wmt14_en_fr_gpt3": (PAIR, "The cat sleeps. =>", " Le chat dort.", 1),
    "wmt14_fr_en": (PAIR, "Le chat dort. =", " The cat sleeps.", 1),
    "wmt14_fr_en_gpt3": (PAIR, "Le chat dort. =>", " The cat sleeps.", 1),
    "wsc273": (WINOGRAD, "The councilmen refused the demonstrators a permit because the councilmen", " feared it.", 2),
    "wsc273_full": (
        WINOGRAD,
        "The councilmen refused the demonstrators a permit because ",
        "the councilmen feared it.",
        2,
    ),
}
# its demonstrations show a chain of thought, but only the result is compared
GSM8K = {
    "question": "48 clips in April, half as many in May. How many?",
    "answer": "In May 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 1,072",
}
CHOICE = Task("mine", "mine", "choice", "{q}:", "{option}", "options", answer="{answer}", separator=";")
CLOZE = Task("mine", "mine", "cloze", "{q}:", answer="{answer}", separator=";")
POOL = [{"q": f"q{n}", "options": [f"right{n}", f"wrong{n}"], "answer": 0} for n in range(8)]


def write_task(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    return str(path)


def test_every_shipped_task_has_an_item_here():
    assert sorted([*SHIPPED, "gsm8k"]) == known_tasks()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_task_builds_the_right_question(name):
    item, context, continuation, options = SHIPPED[name]
    task = load_task(name)
    (item,) = prepared_items(task, [item])
    question = task.question(item)
    assert task.name == name and len(question.contexts) == len(question.continuations) == options
    assert (question.contexts[question.answer], question.continuations[question.answer]) == (context, continuation)
    assert task.demonstrated(item) == context + continuation + task.separator
    assert bool(task.hub) != bool(task.generator)


def test_demonstrations_show_the_chain_of_thought_and_answers_are_compared_by_result():
    task = load_task("gsm8k")
    (item,) = prepared_items(task, [GSM8K])
    assert task.question(item) == Question(["Q: 48 clips in April, half as many in May. How many?\nA:"], ["1072"], 0)
    shown = " In May 48/2 = 24. In all 48+24 = 72 clips. The answer is 1072."
    assert task.demonstrated(item) == task.question(item).contexts[0] + shown + "\n\n"
    question = task.question(item)
    for text in (
        shown,
        "The answer is $1,072.",
        "The answer is 1072 clips",
        "The answer is 3. No: The answer is 1,072",
    ):
        assert task.is_right(text, question)
    for text in ("The answer is 10,72.", "1072", "The answer is 1072.5", "The answer is -1072", "The answer is 11,072"):
        assert not task.is_right(text, question)


@pytest.mark.parametrize(
    ("text", "pronoun", "options", "fitting"),
    [
        ("Ann knows that the dog bit her hand.", "her", ["Ann", "The dog"], ["Ann's", "the dog's"]),
        ("Ann has a dog. It bites.", "It", ["The dog", "Ann"], ["The dog", "Ann"]),
        ("They sing.", "They", ["The men", "A man"], ["The men", "A man"]),
        ("Now they sing.", "they", ["My men", "An aunt of The Hague"], ["my men", "an aunt of The Hague"]),
    ],
)
def test_winograd_s_options_fit_into_their_place(text, pronoun, options, fitting):
    item = {"text": text, "pronoun": pronoun, "pronoun_loc": text.index(pronoun), "options": options, "label": 1}
    (item,) = prepared_items(load_task("wsc273"), [item])
    assert item["options"] == fitting and f"{item['before']}{pronoun}{item['after']}" == text
    for name in ("wsc273", "wsc273_full"):
        question = load_task(name).question(item)
        whole = [context + continuation for context, continuation in zip(question.contexts, question.continuations)]
        assert whole == [text.replace(pronoun, option, 1) for option in fitting]


def test_an_effect_follows_its_cause():
    item = SHIPPED["copa"][0] | {"question": "effect", "premise": "It rained. "}
    assert prepared_items(load_task("copa"), [item])[0]["premise"] == "It rained therefore"


@pytest.mark.parametrize(
    ("name", "item", "words"),
    [
        (
            "wsc273",
            WINOGRAD | {"options": 3},
            "wsc273, item 2 does not have the columns of winograd: 'int' object is not",
        ),
        ("copa", {"premise": "a"}, "copa, item 2 does not have the columns of copa: there is no 'question'"),
        ("copa", SHIPPED["copa"][0] | {"question": "why"}, "there is no 'why'"),
        ("cbt_cn", CBT | {"question": "no blank"}, "cbt_cn, item 2: the question has no blank, XXXXX"),
        ("gsm8k", {"answer": None}, "gsm8k, item 2 does not have the columns of gsm8k: 'NoneType' object has no"),
    ],
)
def test_an_item_with_other_columns_is_named(name, item, words):
    right = GSM8K if name == "gsm8k" else SHIPPED[name][0]
    with pytest.raises(UserError, match=words):
        prepared_items(load_task(name), [right, item])


def test_answers_may_number_the_options_in_other_ways():
    item, _, _, _ = SHIPPED["arc_easy"]
    assert load_task("arc_easy").question(item | {"answerKey": "2"}).answer == 1  # as in some items of the data set
    choices = {"text": ["2", "D", "A", "1"], "label": ["A", "B", "C", "D"]}  # texts that look like option names
    for key, number in (("A", 0), ("2", 1), ("D", 3)):
        assert load_task("arc_easy").question(item | {"choices": choices, "answerKey": key}).answer == number
    item, _, _, _ = SHIPPED["winogrande"]
    question = load_task("winogrande").question(item | {"answer": "1"})
    assert question.answer == 0 and question.continuations[0] == question.continuations[1]


BASE = 'title = "a"\nkind = "cloze"\nanswer = "{a}"\n'
GENERATE = BASE.replace("cloze", "generate")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BASE + 'contxt = "a"', ["no setting contxt", "did you mean context?"]),
        (BASE + "zzz = 1", ["no setting zzz; gpt_arc/evaluation/tasks.py lists them all"]),
        (BASE + 'name = "b"', ["no setting name"]),
        (BASE + "context = 3", ["context = 3 must be a text in quotes"]),
        (BASE + 'answer_from = "1"', ['answer_from = "1" must be a whole number']),
        (BASE + "max_new_tokens = true", ["max_new_tokens = true must be a whole number"]),
        (BASE + "max_new_tokens = 0", ["max_new_tokens = 0 must be at least 1"]),
        (BASE + 'stop = "a"', ['stop = "a" must be a list of texts in quotes']),
        (BASE + 'stop = ["a", ""]', ['number 2 of stop: "" must be a text in quotes that isn\'t empty']),
        (BASE + "stop = [1]", ["number 1 of stop: 1 must be a text in quotes"]),
        (BASE + 'normalise = "bytes"', ['normalise = "bytes" must be one of "sum", "token", "character", "byte", ']),
        (BASE + 'extract = "("', ["extract = '('", "not a regular expression"]),
        (BASE + '[published.accuracy]\na = "b"', ['published.accuracy.a = "b" must be a number']),
        (BASE + "[published]\na = 1.5", ["published.a = 1.5 must be a table"]),
        (BASE + 'options = ["a", "b"]', ["options belongs to the kind choice, not to cloze"]),
        (BASE + 'metric = "bleu"', ["metric belongs to the kind generate, not to cloze"]),
        (GENERATE + "stop_word_filter = true", ["stop_word_filter belongs to the kind cloze, not to generate"]),
        (BASE + "stop_word_filter = 1", ["stop_word_filter = 1 must be true or false"]),
        (BASE + 'prepare = "cb"', ['prepare = "cb" must be one of']),
        (GENERATE + "top_k = 0", ["top_k = 0 must be at least 1"]),
        (GENERATE + "top_k = 2\nnum_beams = 2", ["num_beams does not sample, so top_k has no effect"]),
        (GENERATE + "length_penalty = 0.6", ["length_penalty ranks beams: it needs num_beams"]),
        (GENERATE + "num_beams = 2\nlength_penalty = -1", ["length_penalty = -1 must be between 0 and 100"]),
        (GENERATE + 'metric = "rouge"\nextract = "a"', ["extract has no effect with metric = rouge"]),
        (BASE.replace("cloze", "choice"), ["a choice needs options"]),
        (
            BASE.replace("cloze", "choice") + 'options = ["a"]',
            ['options = ["a"] must be a text in quotes or a list of 2 or more texts in quotes'],
        ),
        (
            BASE.replace("cloze", "choice") + "options = [1, 2]",
            ["options = [1, 2] must be a text in quotes or a list of 2 or more texts in quotes"],
        ),
        (BASE.replace("cloze", "quiz"), ['kind = "quiz" must be one of "choice", "cloze", "generate"']),
        (GENERATE + "length_penalty = inf\nnum_beams = 2", ["length_penalty = inf must be between 0 and 100"]),
        ('kind = "cloze"\nanswer = "a"', ["title is missing"]),
        ('title = "a"\nanswer = "a"', ["kind is missing"]),
        ('title = "a"\nkind = "cloze"', ["answer is missing"]),
        ("title = ", ["not valid TOML"]),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path, content, words):
    path = write_task(tmp_path, content)
    with pytest.raises(UserError) as refused:
        load_task(path)
    assert str(refused.value).startswith(path) and "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words)


def test_an_unknown_task_gets_a_suggestion():
    with pytest.raises(UserError, match="there is no task helaswag; did you mean hellaswag?"):
        load_task("helaswag")
    with pytest.raises(UserError, match="there is no task qqqq; choose one of addition_2, .*, winogrande"):
        load_task("qqqq")
    with pytest.raises(UserError, match="there is no task nowhere.toml"):
        load_task("nowhere.toml")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    Path(tmp_path / "mine.toml").write_bytes(b"title = '\xff'")
    with pytest.raises(UserError, match="mine.toml is not valid TOML"):
        load_task(str(tmp_path / "mine.toml"))


ITEM = {"n": 3, "text": "one two\nthree ", "deep": {"list": ["x", {"y": "z"}]}, "gap": "a _ b _ c", "word": "alone"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{n} of {n}", "3 of 3"),
        ("{deep.list.0}{deep.list.1.y}", "xz"),
        ("[{text.beginning}|{text.last_word}]", "[one two|three]"),
        ("[{gap.before}|{gap.after}]", "[a | b _ c]"),
        ("{}{ n }{3} {word}", "{}{ n }{3} alone"),
    ],
)
def test_templates_are_filled(template, text):
    assert filled(template, ITEM) == text


def test_filled_in_text_is_not_filled_again():
    assert filled("{a}", {"a": "{b}", "b": 1}) == "{b}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{m}", "an item has no m: it has n, text, deep, gap, word"),
        ("{deep.lists}", "an item has no deep.lists: it has list"),
        ("{deep.list.2}", "an item has no deep.list.2"),
        ("{word.beginning}", "an item has no word.beginning"),
        ("{word.before}", "an item has no word.before"),
        ("{n.before}", "an item has no n.before"),
        ("{deep}", "{deep} = "),
    ],
)
def test_a_missing_column_is_named(template, words):
    with pytest.raises(UserError) as refused:
        filled(template, ITEM)
    assert words in str(refused.value)


def test_a_column_without_content_is_refused():
    with pytest.raises(UserError, match="null is not a text or a number"):
        filled("{a}", {"a": None})


def test_columns_of_any_type_are_looked_up():
    assert looked_up("deep.list", ITEM) == ["x", {"y": "z"}]


@pytest.mark.parametrize(
    ("answer", "start", "right"),
    [(0, 0, 0), ("2", 0, 2), (1, 1, 0), ("3", 1, 2), ("A", 0, 0), (" c ", 1, 2)],
)
def test_answers_by_number_and_letter(answer, start, right):
    task = replace(CHOICE, answer_from=start)
    for options in (["one", "two", "three"], ["3", "C", "0"]):
        assert task.question({"q": "", "options": options, "answer": answer}).answer == right


@pytest.mark.parametrize(("answer", "right"), [("two", 1), (" 0 ", 2), ("A", 0)])
def test_answers_by_text(answer, right):
    task = replace(CHOICE, answer_as="text")
    assert task.question({"q": "", "options": ["A", "two", "0"], "answer": answer}).answer == right
    with pytest.raises(UserError, match="the answer '1' is not the text of any of the 3 options"):
        task.question({"q": "", "options": ["A", "two", "0"], "answer": 1})


def test_an_answer_may_be_a_truth_value():
    task = replace(CHOICE, options=("False", "True"), answer_as="text")
    assert [task.question({"q": "", "answer": value}).answer for value in (False, True)] == [0, 1]


@pytest.mark.parametrize(("answer", "start"), [(3, 0), (0, 1), (-1, 0), ("D", 0), ("four", 0), ("", 0), (1.0, 0)])
def test_answers_that_match_no_option_are_refused(answer, start):
    task = replace(CHOICE, answer_from=start)
    with pytest.raises(UserError, match="is not the number or letter of any of the 3 options"):
        task.question({"q": "", "options": ["one", "two", "three"], "answer": answer})


@pytest.mark.parametrize("options", ["ab", ["a"], [1, 2], None, {"a": "b"}])
def test_options_that_are_not_texts_are_refused(options):
    with pytest.raises(UserError, match="options = .* is not a list of two or more texts"):
        CHOICE.question({"q": "", "options": options, "answer": 0})


def test_the_context_template_may_contain_the_option():
    question = replace(CHOICE, context="{q}{option}", continuation="!").question(POOL[0])
    assert question == Question(["q0right0", "q0wrong0"], ["!", "!"], 0)


SOLVED = Question([""], ["18"], 0)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 3 times 6 is 18. The answer is 18.", True),
        (" The answer is 12. No, The answer is 18", True),
        (" The answer is 18. No, The answer is 12", False),
        (" 18", False),
        ("", False),
    ],
)
def test_the_last_match_in_a_chain_of_thought_is_the_answer(text, right):
    task = Task("mine", "mine", "generate", "{q}", answer="{a}", extract=r"The answer is (\d+)")
    assert task.is_right(text, SOLVED) == right
    assert replace(task, extract=r"\d+(?!.*\d)").is_right(text, SOLVED) == (right or text == " 18")  # without a group


@pytest.mark.parametrize(
    ("text", "right"), [("new  york.\n", True), (" New York .", True), ("York", False), ("New. York", False)]
)
def test_case_white_space_and_a_full_stop_are_ignored(text, right):
    task = Task("mine", "mine", "generate", "{q}", answer="{a}")
    assert task.is_right(text, Question([""], ["New York"], 0)) == right


@pytest.mark.parametrize(("text", "answer", "right"), [
    ("", ".", False), (" ", ".", False), (".", ".", True), (". ", " .", True), (".", "", False), ("a.", "a", True),
    ("", "", True),
])  # fmt: skip
def test_an_empty_text_is_no_full_stop(text, answer, right):
    assert Task("t", "T", "generate", answer="{a}").is_right(text, Question([""], [answer], 0)) == right


def numbers_shown(text):
    return [int(part.split(":")[0][1:]) for part in text.split(";")[:-1]]


def test_demonstrations_come_from_the_group_of_the_item_to_answer():
    task = replace(replace(CLOZE, answer="{options.0}"), group="subject.name")
    pool = [item | {"subject": {"name": n % 2}} for n, item in enumerate(POOL)]
    for number, item in enumerate(pool):
        for shuffled in (False, True):
            shown = numbers_shown(demonstrations(task, pool, number, 3, 0, shuffled, item))
            assert len(set(shown)) == 3 and number not in shown and {n % 2 for n in shown} == {number % 2}
    with pytest.raises(
        UserError, match="can't draw 4 demonstrations from 4 items with subject.name = 1, one of them left"
    ):
        demonstrations(task, pool, 1, 4, 0, False, pool[1])


@pytest.mark.parametrize("task", [CHOICE, replace(CLOZE, answer="{options.0}")], ids=["choice", "cloze"])
def test_demonstrations_are_drawn_by_seed_and_item(task):
    drawn = {}
    for seed in range(3):
        for number in range(8):
            text = drawn[seed, number] = demonstrations(task, POOL, number, 4, seed, False)
            shown = numbers_shown(text)
            assert len(set(shown)) == 4 and number not in shown
            assert text == "".join(f"q{n}:right{n};" for n in shown)
            assert text == demonstrations(task, POOL, number, 4, seed, False)
    assert len(set(drawn.values())) > 20
    assert {n for text in drawn.values() for n in numbers_shown(text)} == set(range(8))
    assert demonstrations(task, POOL, 0, 0, 0, False) == ""


def test_at_most_all_other_items_are_demonstrated():
    assert sorted(numbers_shown(demonstrations(CHOICE, POOL, 3, 7, 0, False))) == [0, 1, 2, 4, 5, 6, 7]
    with pytest.raises(UserError, match="can't draw 8 demonstrations from 8 items"):
        demonstrations(CHOICE, POOL, 3, 8, 0, False)


def test_a_demonstration_that_lacks_a_column_is_named():
    pool = [POOL[0], {"q": "q1", "answer": 0}]
    with pytest.raises(UserError, match="item 2 as a demonstration: an item has no options"):
        demonstrations(CHOICE, pool, 0, 1, 0, False)


def test_a_demonstration_may_contain_more_than_the_answer():
    task = replace(CLOZE, demonstration=" think, so {answer}")
    assert demonstrations(task, [{"q": "a", "answer": 1}, {"q": "b", "answer": 2}], 0, 1, 0, False) == (
        "b: think, so 2;"
    )


def test_shuffled_answers_of_a_choice_are_random_options():
    answers = Counter()
    for number in range(100):
        text = demonstrations(CHOICE, POOL, number % 8, 4, number, True)
        for part in text.split(";")[:-1]:
            question, answer = part.split(":")
            assert answer in (f"right{question[1:]}", f"wrong{question[1:]}")
            answers[answer[0]] += 1
        assert text == demonstrations(CHOICE, POOL, number % 8, 4, number, True)
    assert abs(answers["r"] - 200) < 4 * math.sqrt(400 / 4)


def test_shuffled_answers_without_options_come_from_other_items():
    pool = [{"q": f"q{n}", "answer": f"a{n}"} for n in range(8)]
    texts = [demonstrations(CLOZE, pool, number, 4, seed, True) for number in range(8) for seed in range(20)]
    drawn = {tuple(part.split(":")) for text in texts for part in text.split(";")[:-1]}
    assert drawn == {
        (f"q{n}", f"a{m}") for n in range(8) for m in range(8) if n != m
    }  # 640 draws, never the item's answer


@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize(
    ("operation", "word", "right"),
    [
        ("addition", "plus", lambda a, b: a + b),
        ("subtraction", "minus", lambda a, b: a - b),
        ("multiplication", "times", lambda a, b: a * b),
    ],
)
def test_arithmetic_is_right_and_its_demonstrations_are_never_questions(operation, word, right, digits):
    pairs = {}
    for split in ("test", "train"):
        items = arithmetic(f"{operation} {digits}", 300, 0, split)
        assert len(items) == 300 and items == arithmetic(f"{operation} {digits}", 300, 0, split)
        assert items != arithmetic(f"{operation} {digits}", 300, 1, split)
        for item in items:
            assert item["value"] == right(item["a"], item["b"]) and item["operation"] == word
            assert 0 <= item["a"] < 10**digits and 0 <= item["b"] < 10**digits
        pairs[split] = {(item["a"], item["b"]) for item in items}
    assert pairs["test"] and pairs["train"] and not pairs["test"] & pairs["train"]


@pytest.mark.parametrize("split", ["test", "train"])
def test_numbers_and_results_of_arithmetic_are_uniform(split):
    """First and last digits, and the sum's last digit, are uniform within four standard deviations."""
    items = arithmetic("addition 3", 2000, 0, split)
    for digit in (
        [item["a"] % 10 for item in items],
        [item["b"] % 10 for item in items],
        [item["a"] // 100 for item in items],
        [item["b"] // 100 for item in items],
        [item["value"] % 10 for item in items],
    ):
        counts = np.bincount(digit, minlength=10)
        assert len(counts) == 10 and np.abs(counts - 200).max() < 4 * math.sqrt(2000 * 0.1 * 0.9)


@pytest.mark.parametrize("kind", ["addition", "addition two", "addition 0", "division 2", "", "addition 10"])
def test_an_unknown_generator_is_refused(kind):
    with pytest.raises(UserError, match='generator = ".*": write addition, subtraction, multiplication'):
        arithmetic(kind, 1, 0, "test")


def test_items_are_read_from_files_as_written(tmp_path):
    items = [{"a": 1, "b": ["x", "é"], "c": {"d": "e\u2028f"}}, {"a": 2, "b": [], "c": {"d": "g"}}]
    lines = tmp_path / "items.jsonl"
    lines.write_text("\ufeff" + "\n\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n", "utf-8")
    assert load_items(CHOICE, "test", lines, 0) == items
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / "items.parquet")
    assert load_items(CHOICE, "test", tmp_path / "items.parquet", 0) == items


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "holds no items"),
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "a.jsonl, line 2"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}', "a.jsonl is not UTF-8"),
        ("a.csv", b"a\n", "items are read from .jsonl and .parquet files"),
        ("a.parquet", b"no parquet at all", "a.parquet is not readable as parquet"),
        ("a.jsonl", None, "there is no file"),
        ("a.parquet", None, "there is no file"),
    ],
)
def test_files_without_items_are_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_items(CHOICE, "test", tmp_path / name, 0)


def test_an_empty_parquet_file_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": []}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet holds no items"):
        load_items(CHOICE, "test", tmp_path / "a.parquet", 0)


def test_a_task_without_a_data_set_needs_a_file():
    with pytest.raises(UserError, match="mine names no data set: give a file of items with --data"):
        load_items(CHOICE, "test", None, 0)


def test_the_task_s_data_set_and_split_are_loaded_from_the_hub(monkeypatch):
    calls = []

    def load(*location, split):
        calls.append((*location, split))
        return datasets.Dataset.from_list([{"a": 1}, {"a": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_items(load_task("arc_easy"), "test", None, 0) == [{"a": 1}, {"a": 2}]
    for name in ("wsc273_full", "gsm8k", "cnn_dailymail"):
        load_items(load_task(name), "test", None, 0)
    load_items(load_task("hellaswag"), "train", None, 0)
    load_items(load_task("hellaswag"), "test", None, 0)
    assert calls[0] == ("allenai/ai2_arc", "ARC-Easy", "test")
    assert calls[1:4] == [
        ("lighteval/winograd_wsc", "wsc273", "test"),
        ("openai/gsm8k", "main", "test"),
        ("abisee/cnn_dailymail", "3.0.0", "test"),
    ]
    assert calls[4:] == [("Rowan/hellaswag", None, "train"), ("Rowan/hellaswag", None, "validation")]


def test_the_requested_number_of_items_is_generated():
    task = load_task("addition_2")
    assert len(load_items(task, "test", None, 0, 17)) == 17
    assert load_items(task, "test", None, 0, 17) == load_items(task, "test", None, 0)[:17]


def test_the_standard_error_equals_the_closed_form():
    for right, count in ((3, 10), (0, 5), (50, 100)):
        share = right / count
        values = [1.0] * right + [0.0] * (count - right)
        assert standard_error(values) == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))
    assert standard_error([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt((16 + 1 + 25) / 9 / 2 / 3))
    assert standard_error([3.0]) == 0


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 0), (7, 2), (4, 4), (3, 10), (30, 12)])
def test_the_p_value_equals_the_sign_test(better, worse):
    before = [0.0] * better + [1.0] * worse + [1.0] * 20 + [0.0] * 5
    after = [1.0] * better + [0.0] * worse + [1.0] * 20 + [0.0] * 5
    order = random.Random(0).sample(range(len(before)), len(before))
    number = better + worse
    tail = sum(math.comb(number, k) for k in range(min(better, worse) + 1)) / 2**number
    value = paired_p_value([before[i] for i in order], [after[i] for i in order])
    assert value == pytest.approx(min(2 * tail, 1))
