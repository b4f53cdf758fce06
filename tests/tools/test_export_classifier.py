"""Fine-tuned models loaded by transformers: the same logits, class names and special tokens."""

import dataclasses
import json
import random

import pytest
import torch
import transformers
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from exports import described, with_version
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, LibraryTokenizer, SentencePieceTokenizer, load_tokenizer
from gpt_arc.errors import entry_point
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, make_batch, save_classifier
from gpt_arc.finetuning.encoding import encode_examples
from gpt_arc.finetuning.examples import Columns, Example, SpecialTokens, sequences_of
from gpt_arc.finetuning.lstm import LSTM
from gpt_arc.finetuning.predictions import predict
from helpers import randomised
from model import GPT, GPTConfig
from tools import export

TEXT = "The cat sat on the mat, didn't it? 1234 naïve 漢字 🙂🙃\n\n  indented\ttext . , !"
VOCABULARY, SPECIAL = 300, SpecialTokens.after(300)
QWEN3 = dict(positions="rotary", norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias=False, qk_norm=True)
CONFIGS = {
    "gpt2": GPTConfig(24, 303, 2, 3, 24, dropout=0.1),
    "gpt2-untied": GPTConfig(24, 303, 1, 2, 8, tied_head=False),
    "gpt2-unbiased": GPTConfig(24, 303, 2, 2, 16, bias=False),
    "openai-gpt": GPTConfig(24, 303, 3, 2, 20, norm_position="post", attention_dropout=0.2),
    "openai-gpt-untied": GPTConfig(24, 303, 1, 2, 20, norm_position="post", tied_head=False),
    "qwen3": GPTConfig(24, 303, 2, 6, 32, 2, 10, 44, **QWEN3, rotary_base=5e3),
    "llama": GPTConfig(24, 303, 1, 4, 32, 2, mlp_size=44, **QWEN3 | {"qk_norm": False}),
}
LABELS = {"classification": ("bad", "so-so", "good"), "entailment": ("no", "yes"), "regression": None}
TEXTS = {
    "classification": [("The cat",), ("it sat on the mat 🙂",), ("",)],
    "entailment": [("The cat sat", "it sat"), ("naïve", "漢字"), ("text", "1234 . , !")],
    "multiple_choice": [("The cat", "sat", "on the mat"), ("did it", "!", "text , indented")],
}


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([TEXT] * 20, VOCABULARY)


@pytest.fixture
def run(output_of):
    return lambda *argv: output_of(entry_point(export.main), "tools/export.py", *map(str, argv))


@pytest.fixture
def exported(run, tmp_path):
    """Saves a classifier and exports it; returns the folder and the output."""

    def call(classifier, tokenizer, *flags):
        save_classifier(classifier, tokenizer, tmp_path / "run" / "best")  # as in a run folder
        return tmp_path / "export", run(tmp_path / "run", tmp_path / "export", "--to=hf", *flags)

    return call


def classifier_of(
    config, task="classification", labels=("bad", "good"), special=SPECIAL, trunk=GPT, max_tokens=20, **settings
):
    columns = Columns.usual(task)
    trained = ClassifierConfig(task, labels, special, columns, max_tokens, **settings)
    return randomised(Classifier(trunk(config), trained))


def batch_of(classifier, tokenizer, task):
    examples = [
        sequences_of(Example(texts, None, "here"), task, tokenizer, classifier.config.special, 20)[0]
        for texts in TEXTS[task]
    ]
    return make_batch(examples, [0] * len(examples))


def assert_saves_the_same(folder, loaded, resaved):
    """Asserts that transformers, having loaded the export, saves the same files."""
    loaded.save_pretrained(resaved)
    assert with_version(folder / "config.json") == json.loads((resaved / "config.json").read_text())
    assert described(folder) == described(resaved)


@pytest.mark.parametrize("task", ["classification", "entailment", "regression"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "gpt2-unbiased", "openai-gpt", "qwen3", "llama"])
def test_logits_of_a_padded_batch(name, task, tokenizer, exported, tmp_path):
    labels, task = LABELS[task], "classification" if task == "regression" else task
    classifier = classifier_of(CONFIGS[name], task, labels)
    folder, output = exported(classifier, tokenizer)
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert f"export: {type(loaded).__name__}, {loaded.num_parameters():,} parameters in float32" in output
    batch = batch_of(classifier, tokenizer, task)
    tokens, lengths = batch.tokens[:, 0], batch.lengths
    assert len(set(lengths.flatten().tolist())) > 1
    padding = torch.arange(tokens.size(1)) >= lengths
    tokens = tokens.masked_fill(padding, loaded.config.pad_token_id)
    with torch.no_grad():
        expected = classifier(*batch).logits
        for mask in (None, ~padding):
            logits = loaded.eval()(tokens, attention_mask=mask).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    if labels is None:
        assert (loaded.config.num_labels, loaded.config.problem_type) == (1, "regression")
        target = torch.tensor([1.0, -2.0, 0.5])
        loss = loaded(tokens, labels=target).loss
        torch.testing.assert_close(3 * loss, classifier(*batch[:2], target).task_loss, atol=1e-5, rtol=1e-5)
    else:
        assert loaded.config.id2label == dict(enumerate(labels))
        assert loaded.config.label2id == {label: number for number, label in enumerate(labels)}
        assert loaded.config.problem_type == "single_label_classification"
    assert_saves_the_same(folder, loaded, tmp_path / "again")
    readme = (folder / "README.md").read_text()
    assert type(loaded).__name__ in readme and export.LAYOUTS[task] in readme and "[extract] = 302" in readme


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "openai-gpt", "gpt2-unbiased", "qwen3", "llama"])
def test_numbers_have_their_own_units(name, tokenizer, exported):
    classifier = classifier_of(CONFIGS[name], "classification", None, mean=50.0, scale=10.0)
    folder, output = exported(classifier, tokenizer)
    dropped = 0.0 if name in ("gpt2", "gpt2-untied", "openai-gpt") else 50.0
    if dropped:
        assert "has a bias of 50, which " in output and "moves all values by that constant" in output
        folder, _ = exported(classifier, tokenizer, "--drop_bias")
        assert "Add 50 for the values" in (folder / "README.md").read_text()
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = batch_of(classifier, tokenizer, "classification")
    padding = torch.arange(batch.tokens.size(2)) >= batch.lengths
    tokens = batch.tokens[:, 0].masked_fill(padding, loaded.config.pad_token_id)
    with torch.no_grad():
        expected = classifier(*batch).logits
        assert expected.std() > 0.05
        torch.testing.assert_close(loaded(tokens).logits + dropped, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "openai-gpt", "openai-gpt-untied"])
def test_logits_of_options(name, tokenizer, exported, tmp_path):
    classifier = classifier_of(CONFIGS[name], "multiple_choice", None, dropout=0.3)
    folder, _ = exported(classifier, tokenizer)
    class_name = json.loads((folder / "config.json").read_text())["architectures"][0]
    loaded, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert class_name == {"gpt": "GPT2", "ope": "OpenAIGPT"}[name[:3]] + "DoubleHeadsModel"
    assert loaded.multiple_choice_head.first_dropout.p == 0.3
    batch = batch_of(classifier, tokenizer, "multiple_choice")
    with torch.no_grad():
        outcome = loaded.eval()(batch.tokens, mc_token_ids=batch.lengths - 1)
        torch.testing.assert_close(outcome.mc_logits, classifier(*batch).logits, atol=1e-5, rtol=1e-5)
        language = classifier.trunk(batch.tokens.flatten(0, 1)).unflatten(0, batch.lengths.shape)
        torch.testing.assert_close(outcome.logits, language, atol=1e-5, rtol=1e-5)
    if name == "openai-gpt":  # transformers saves the tied tensor under its other name, but loads either
        assert "transformer.tokens_embed.weight" in described(folder)[0]
        assert torch.equal(loaded.lm_head.weight, classifier.trunk.token_embedding.weight)
    else:
        assert_saves_the_same(folder, loaded, tmp_path / "again")


def test_half_precision(tokenizer, exported):
    classifier = classifier_of(CONFIGS["gpt2"])
    folder, output = exported(classifier, tokenizer, "--dtype=bfloat16")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert "in bfloat16" in output and loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.score.weight, classifier.head.weight.bfloat16())


def as_qwen(tokenizer, folder):
    """The tokenizer as in Qwen's files: another pre-tokenizer, and the name of a transformers class."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    library = Library.from_buffer(tokenizer.files()["tokenizer.json"])
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return LibraryTokenizer(library.to_str().encode()).declare(folder)


def as_gpt1(folder):
    """A tokenizer in GPT-1's published format."""
    characters = sorted(set(TEXT.lower()) - set(" \n\t"))
    tokens = ["<unk>", *characters, *(f"{character}</w>" for character in characters), "th", "the</w>"]
    (folder / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    return load_tokenizer(folder / "vocab.json")


def tokenizer_of(kind, trained, folder):
    if kind == "characters":
        return CharTokenizer.from_text(TEXT)
    if kind == "qwen":
        return as_qwen(trained, folder)
    return as_gpt1(folder) if kind == "gpt1" else trained


@pytest.mark.parametrize("rows", [0, 5], ids=["next", "after-a-gap"])
@pytest.mark.parametrize("kind", ["characters", "trained", "qwen", "gpt1"])
def test_auto_tokenizer_knows_the_special_tokens(kind, rows, tokenizer, exported, tmp_path):
    tokenizer = tokenizer_of(kind, tokenizer, tmp_path)
    special = SpecialTokens.after(tokenizer.vocab_size + rows)
    config = dataclasses.replace(CONFIGS["gpt2"], vocab_size=special.extract + 1)
    classifier = classifier_of(config, "entailment", special=special)
    folder, output = exported(classifier, tokenizer)
    assert "doesn't know" not in output
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    start, delimiter, extract = special
    text_ids, other_ids = tokenizer.encode("some text"), tokenizer.encode("The cat")
    assert loaded("some text", "The cat").input_ids == [start, *text_ids, delimiter, *other_ids, extract]
    assert loaded("some text", "").input_ids == [start, *text_ids, delimiter, extract]
    spelled = loaded.tokenize("_start_some text", split_special_tokens=False)
    assert loaded.convert_tokens_to_ids(spelled) == [start, *text_ids]
    assert loaded("mat, didn't it? 1234", add_special_tokens=False).input_ids == tokenizer.encode(
        "mat, didn't it? 1234"
    )
    assert loaded.decode([start, *text_ids, extract], skip_special_tokens=True) == tokenizer.decode(text_ids)
    # the tokenizer's batch is all that the model needs
    pairs = [("The cat sat", "it sat"), ("text", "1234 . , !")]
    batch = loaded(*map(list, zip(*pairs)), padding=True, return_tensors="pt")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    examples = [sequences_of(Example(pair, None, ""), "entailment", tokenizer, special, 24)[0] for pair in pairs]
    with torch.no_grad():
        expected = classifier(*make_batch(examples, [0, 0])).logits
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def drawn_text(draw, longest, kind):
    """A text of up to `longest` characters; unless `kind` is "characters", some spell special tokens."""
    text = "".join(draw.choice(TEXT) for _ in range(draw.randrange(longest + 1)))
    spelled = ("", "", "_start_", "_classify_s", "<|endoftext|>") if kind != "characters" else ("",)
    return text + draw.choice(spelled)


@pytest.mark.parametrize("task", ["classification", "entailment", "regression"])
@pytest.mark.parametrize("kind, name", [
    ("characters", "gpt2"), ("trained", "gpt2"), ("trained", "qwen3"), ("qwen", "qwen3"), ("gpt1", "openai-gpt"),
])  # fmt: skip
def test_a_pipeline_answers_as_predict_does(kind, name, task, tokenizer, exported, tmp_path):
    """Over texts that are empty, cut, or spell special tokens, alone and in padded batches."""
    tokenizer, labels = tokenizer_of(kind, tokenizer, tmp_path), LABELS[task]
    task = "classification" if task == "regression" else task
    special = SpecialTokens.after(tokenizer.vocab_size)
    config = dataclasses.replace(CONFIGS[name], vocab_size=special.extract + 1)
    # of two long texts, the tokenizers library gives an odd token to the second: an even number is left for them
    classifier = classifier_of(config, task, labels, special, max_tokens=20 if task == "classification" else 21)
    folder, _ = exported(classifier, tokenizer)
    draw, texts = random.Random(0), 1 if task == "classification" else 2
    rows = [tuple(drawn_text(draw, 24 // texts, kind) for _ in range(texts)) for _ in range(100)]
    encoded = encode_examples([Example(row, None, "") for row in rows], classifier.config, tokenizer)
    assert 9 < encoded.cut < 90 and any("" in row for row in rows)
    predicted = predict(classifier, encoded, 16, torch.device("cpu"), "float32")
    expected = predicted.logits if labels is None else predicted.probabilities
    classify = transformers.pipeline("text-classification", str(folder), truncation=True, top_k=None)
    inputs = [dict(zip(("text", "text_pair"), one.texts)) for one in encoded.examples]
    for batch_size, count in ((1, 25), (8, 100)):
        answers = classify(inputs[:count], batch_size=batch_size)
        answers = [{one["label"]: one["score"] for one in each} for each in answers]
        scores = [[each[label] for label in labels or ("LABEL_0",)] for each in answers]
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected[:count]).float(), atol=1e-5, rtol=1e-5)


def test_a_declared_start_token_is_not_added_to_a_classifier_s_texts(tokenizer, exported, tmp_path):
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|endoftext|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    declared = LibraryTokenizer(tokenizer.files()["tokenizer.json"]).declare(tmp_path)
    folder, _ = exported(classifier_of(CONFIGS["gpt2"]), declared)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("The cat").input_ids == [SPECIAL.start, *tokenizer.encode("The cat"), SPECIAL.extract]


def test_special_ids_that_a_tokenizer_can_t_have_are_reported(tokenizer, sentencepiece_model, exported):
    pieces = SentencePieceTokenizer(sentencepiece_model)
    _, output = exported(classifier_of(CONFIGS["gpt2"]), pieces)
    message = "AutoTokenizer doesn't know [start] = 300, [delimiter] = 301, [extract] = 302"
    assert message in output
    folder, output = exported(classifier_of(CONFIGS["gpt2"]), with_clashing_name(tokenizer), "--overwrite=True")
    assert message in output
    assert "_start_" not in (folder / "README.md").read_text()
    library = Library(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], 0, False))  # a list, so without gaps
    _, output = exported(
        classifier_of(CONFIGS["gpt2"]), LibraryTokenizer(library.to_str().encode()), "--overwrite=True"
    )
    assert message in output


def with_clashing_name(tokenizer):
    """The tokenizer with a token named as [start] would be."""
    library = Library.from_buffer(tokenizer.files()["tokenizer.json"])
    library.add_special_tokens(["_start_"])
    return LibraryTokenizer(library.to_str().encode())


def test_classifiers_without_counterpart_are_refused(tokenizer, exported):
    def refused(*args, **settings):
        folder, sentence = exported(classifier_of(*args, **settings), tokenizer)
        assert not folder.exists()
        return sentence

    assert "task = similarity" in refused(CONFIGS["gpt2"], "similarity")
    assert "is an LSTM" in refused(CONFIGS["gpt2"], trunk=LSTM, lstm=True)
    assert "has no qwen3 class with one logit per option" in refused(CONFIGS["qwen3"], "multiple_choice", None)
    assert "head_bias = true" in refused(dataclasses.replace(CONFIGS["gpt2"], head_bias=True))
