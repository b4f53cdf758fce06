"""Fine-tuned models as transformers reads them: the same logits, the names of the classes, the special tokens."""

import dataclasses
import json

import pytest
import torch
import transformers
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from exports import described, with_version
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, LibraryTokenizer, SentencePieceTokenizer, load_tokenizer
from gpt_arc.errors import entry_point
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, make_batch, save_classifier
from gpt_arc.finetuning.examples import Columns, Example, SpecialTokens, sequences_of
from gpt_arc.finetuning.lstm import LSTM
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
    """Save a classifier and export it: the folder, and what was said."""

    def call(classifier, tokenizer, *flags):
        save_classifier(classifier, tokenizer, tmp_path / "run" / "best")  # as in the folder of a run
        return tmp_path / "export", run(tmp_path / "run", tmp_path / "export", "--to=hf", *flags)

    return call


def classifier_of(config, task="classification", labels=("bad", "good"), special=SPECIAL, trunk=GPT, **settings):
    columns = Columns.usual(task)
    trained = ClassifierConfig(task, labels, special, columns, max_tokens=20, **settings)
    return randomised(Classifier(trunk(config), trained))


def batch_of(classifier, tokenizer, task):
    examples = [
        sequences_of(Example(texts, None, "here"), task, tokenizer, classifier.config.special, 20)[0]
        for texts in TEXTS[task]
    ]
    return make_batch(examples, [0] * len(examples))


def assert_saved_alike(folder, theirs, again):
    """The export is what transformers writes of the model that it has read."""
    theirs.save_pretrained(again)
    assert with_version(folder / "config.json") == json.loads((again / "config.json").read_text())
    assert described(folder) == described(again)


@pytest.mark.parametrize("task", ["classification", "entailment", "regression"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "gpt2-unbiased", "openai-gpt", "qwen3"])
def test_logits_of_a_padded_batch(name, task, tokenizer, exported, tmp_path):
    labels, task = LABELS[task], "classification" if task == "regression" else task
    ours = classifier_of(CONFIGS[name], task, labels)
    folder, output = exported(ours, tokenizer)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert f"export: {type(theirs).__name__}, {theirs.num_parameters():,} parameters in float32" in output
    batch = batch_of(ours, tokenizer, task)
    tokens, lengths = batch.tokens[:, 0], batch.lengths
    assert len(set(lengths.flatten().tolist())) > 1
    padding = torch.arange(tokens.size(1)) >= lengths
    tokens = tokens.masked_fill(padding, theirs.config.pad_token_id)
    with torch.no_grad():
        expected = ours(*batch).logits
        for mask in (None, ~padding):
            logits = theirs.eval()(tokens, attention_mask=mask).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    if labels is None:
        assert (theirs.config.num_labels, theirs.config.problem_type) == (1, "regression")
        target = torch.tensor([1.0, -2.0, 0.5])
        loss = theirs(tokens, labels=target).loss
        torch.testing.assert_close(3 * loss, ours(*batch[:2], target).task_loss, atol=1e-5, rtol=1e-5)
    else:
        assert theirs.config.id2label == dict(enumerate(labels))
        assert theirs.config.label2id == {label: number for number, label in enumerate(labels)}
        assert theirs.config.problem_type == "single_label_classification"
    assert_saved_alike(folder, theirs, tmp_path / "again")
    readme = (folder / "README.md").read_text()
    assert type(theirs).__name__ in readme and export.LAYOUTS[task] in readme and "[extract] = 302" in readme


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "openai-gpt", "openai-gpt-untied"])
def test_logits_of_options(name, tokenizer, exported, tmp_path):
    ours = classifier_of(CONFIGS[name], "multiple_choice", None, dropout=0.3)
    folder, _ = exported(ours, tokenizer)
    class_name = json.loads((folder / "config.json").read_text())["architectures"][0]
    theirs, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert class_name == {"gpt": "GPT2", "ope": "OpenAIGPT"}[name[:3]] + "DoubleHeadsModel"
    assert theirs.multiple_choice_head.first_dropout.p == 0.3
    batch = batch_of(ours, tokenizer, "multiple_choice")
    with torch.no_grad():
        outcome = theirs.eval()(batch.tokens, mc_token_ids=batch.lengths - 1)
        torch.testing.assert_close(outcome.mc_logits, ours(*batch).logits, atol=1e-5, rtol=1e-5)
        language = ours.trunk(batch.tokens.flatten(0, 1)).unflatten(0, batch.lengths.shape)
        torch.testing.assert_close(outcome.logits, language, atol=1e-5, rtol=1e-5)
    if name == "openai-gpt":  # whose one tensor of two names transformers would save by the other, and reads by either
        assert "transformer.tokens_embed.weight" in described(folder)[0]
        assert torch.equal(theirs.lm_head.weight, ours.trunk.token_embedding.weight)
    else:
        assert_saved_alike(folder, theirs, tmp_path / "again")


def test_half_precision(tokenizer, exported):
    ours = classifier_of(CONFIGS["gpt2"])
    folder, output = exported(ours, tokenizer, "--dtype=bfloat16")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert "in bfloat16" in output and theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.score.weight, ours.head.weight.bfloat16())


def as_qwen(tokenizer, folder):
    """The tokenizer as Qwen's files have it, cutting text in another way and naming a class of transformers."""
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
    """A tokenizer of the kind that GPT-1 was published with."""
    characters = sorted(set(TEXT.lower()) - set(" \n\t"))
    tokens = ["<unk>", *characters, *(f"{character}</w>" for character in characters), "th", "the</w>"]
    (folder / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    return load_tokenizer(folder / "vocab.json")


@pytest.mark.parametrize("rows", [0, 5], ids=["next", "after-a-gap"])
@pytest.mark.parametrize("kind", ["characters", "trained", "qwen", "gpt1"])
def test_auto_tokenizer_knows_the_special_tokens(kind, rows, tokenizer, exported, tmp_path):
    if kind == "characters":
        tokenizer = CharTokenizer.from_text(TEXT)
    elif kind == "qwen":
        tokenizer = as_qwen(tokenizer, tmp_path)
    elif kind == "gpt1":
        tokenizer = as_gpt1(tmp_path)
    special = SpecialTokens.after(tokenizer.vocab_size + rows)
    config = dataclasses.replace(CONFIGS["gpt2"], vocab_size=special.extract + 1)
    ours = classifier_of(config, "entailment", special=special)
    folder, output = exported(ours, tokenizer)
    assert "doesn't know" not in output
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    start, delimiter, extract = special
    some, other = tokenizer.encode("some text"), tokenizer.encode("The cat")
    read = theirs("_start_some text_classify_", add_special_tokens=False)
    assert read.input_ids == theirs("_start_some text_classify_").input_ids == [start, *some, extract]
    assert theirs("_start_some text_delimiter_The cat_classify_").input_ids == [
        start, *some, delimiter, *other, extract
    ]  # fmt: skip
    assert theirs("mat, didn't it? 1234").input_ids == tokenizer.encode("mat, didn't it? 1234")
    assert theirs.decode([start, *some, extract], skip_special_tokens=True) == tokenizer.decode(some)
    # so that a tokenizer's batch is all it takes
    pairs = [("The cat sat", "it sat"), ("text", "1234 . , !")]
    batch = theirs([f"_start_{a}_delimiter_{b}_classify_" for a, b in pairs], padding=True, return_tensors="pt")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    examples = [sequences_of(Example(pair, None, ""), "entailment", tokenizer, special, 24)[0] for pair in pairs]
    with torch.no_grad():
        expected = ours(*make_batch(examples, [0, 0])).logits
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_ids_are_told_where_a_tokenizer_cannot_have_them(tokenizer, sentencepiece_model, exported):
    pieces = SentencePieceTokenizer(sentencepiece_model)
    _, output = exported(classifier_of(CONFIGS["gpt2"]), pieces)
    told = "AutoTokenizer doesn't know [start] = 300, [delimiter] = 301, [extract] = 302"
    assert told in output
    folder, output = exported(classifier_of(CONFIGS["gpt2"]), named_alike(tokenizer), "--overwrite=True")
    assert told in output
    assert "_start_" not in (folder / "README.md").read_text()
    library = Library(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], 0, False))  # a list: without gaps
    _, output = exported(
        classifier_of(CONFIGS["gpt2"]), LibraryTokenizer(library.to_str().encode()), "--overwrite=True"
    )
    assert told in output


def named_alike(tokenizer):
    """The tokenizer with a token of its own of the name that [start] would have."""
    library = Library.from_buffer(tokenizer.files()["tokenizer.json"])
    library.add_special_tokens(["_start_"])
    return LibraryTokenizer(library.to_str().encode())


def test_what_has_no_counterpart_is_refused(tokenizer, exported):
    def refused(*args, **settings):
        folder, sentence = exported(classifier_of(*args, **settings), tokenizer)
        assert not folder.exists()
        return sentence

    assert "task = similarity" in refused(CONFIGS["gpt2"], "similarity")
    assert "is an LSTM" in refused(CONFIGS["gpt2"], trunk=LSTM, lstm=True)
    assert "has no qwen3 class with one logit per option" in refused(CONFIGS["qwen3"], "multiple_choice", None)
    assert "head_bias = true" in refused(dataclasses.replace(CONFIGS["gpt2"], head_bias=True))
