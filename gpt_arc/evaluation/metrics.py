"""What a task measures: a value for each question, and the figure that sums them up."""

import math
from collections.abc import Sequence
from typing import Any

from gpt_arc.evaluation.reader import Reader
from gpt_arc.evaluation.statistics import standard_error
from gpt_arc.evaluation.tasks import Question, Task
from gpt_arc.evaluation.text_metrics import bleu, bleu_counts, first_sentences, rouge
from gpt_arc.evaluation.word_search import STOP_WORDS, WordTokens, likeliest_words


def choice_accuracy(task: Task, reader: Reader, questions: list[tuple[Question, str]]) -> list[float]:
    """Returns 1.0 for each question whose best option is the right one, else 0.0. The first of equal options wins.

    A question comes with the text before it: the description and the demonstrations.
    """
    pairs = [
        (before + context, option)
        for question, before in questions
        for context, option in zip(question.contexts, question.continuations)
    ]
    places = [
        f"{question.place}, option {number}" for question, _ in questions for number in range(len(question.contexts))
    ]
    if task.image:
        images = [question.image for question, _ in questions for _ in question.contexts]
        scores = reader.score_about_images(pairs, images, task.name, places)
    else:
        scores = reader.score(pairs, task.name, places)
    values = [score.log_probability for score in scores]
    if task.normalise == "token":
        values = [value / score.tokens for value, score in zip(values, scores)]
    elif task.normalise in ("character", "byte"):
        options = [option.removeprefix(" ") or option for _, option in pairs]
        sizes = [len(option if task.normalise == "character" else option.encode()) for option in options]
        values = [value / size for value, size in zip(values, sizes)]
    elif task.normalise == "unconditional":
        unconditional = [(task.unconditional, option) for _, option in pairs]
        alone = reader.score(unconditional, f"{task.name}, unconditional", places)
        values = [value - score.log_probability for value, score in zip(values, alone)]
    right, start = [], 0
    for question, _ in questions:
        option_values = values[start : start + len(question.contexts)]
        right.append(float(option_values.index(max(option_values)) == question.answer))
        start += len(option_values)
    return right


def item_values(task: Task, reader: Reader, questions: list[tuple[Question, str]], seed: int) -> dict[str, list[Any]]:
    """Returns each of the task's metrics with its value for every question; `summary` makes one figure of them."""
    if task.kind == "choice":
        return {"accuracy": choice_accuracy(task, reader, questions)}
    if task.kind == "cloze":
        pairs = [(before + question.contexts[0], question.continuations[0]) for question, before in questions]
        places = [question.place for question, _ in questions]
        scores = reader.score(pairs, task.name, places)
        right = [score.is_greedy for score in scores]
        if task.stop_word_filter:
            tokens = reader.encode_pairs(pairs, places).requests
            words = WordTokens(reader.tokenizer)
            right = likeliest_words(words, reader.model, tokens, STOP_WORDS, reader.batch_tokens, task.name)
        return {
            "accuracy": [float(correct) for correct in right],
            "perplexity": [-score.log_probability for score in scores],
        }
    prompts = [before + question.contexts[0] for question, before in questions]
    images = [question.image for question, _ in questions] if task.image else None
    texts = reader.answers(prompts, task, seed, images)
    if task.metric == "exact match":
        return {"exact match": [float(task.is_right(text, question)) for text, (question, _) in zip(texts, questions)]}
    texts = [first_sentences(text, task.sentences) if task.sentences else text.strip() for text in texts]
    pairs = [(text, question.continuations[0].strip()) for text, (question, _) in zip(texts, questions)]
    return {"BLEU": [bleu_counts(*pair) for pair in pairs]} if task.metric == "bleu" else rouge(pairs)


def summary(metric: str, values: Sequence[Any]) -> tuple[float, float]:
    """Returns a metric's figure over all items and its standard error."""
    if metric == "BLEU":
        return bleu(values)
    value, error = sum(values) / len(values), standard_error(values)
    if metric == "perplexity":  # the error of the mean log, carried through the exponential
        value = math.exp(min(value, 700.0))
        error *= value
    return value, error
