"""Every kind of export gives the probabilities of our model in transformers, over 500 inputs of random lengths.

`python -m pytest -n0 -m slow -s tests/tools/test_export_parity.py` prints the largest differences.
"""

import json
import random

import pytest
import torch
import transformers

from gpt_arc.alignment.reward_model import RewardModel, save_reward_model, score_sequences
from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn
from gpt_arc.data.batches import pad_rows
from gpt_arc.data.tokenizer import BPETokenizer
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, save_classifier
from gpt_arc.finetuning.encoding import encode_examples
from gpt_arc.finetuning.examples import Columns, Example, SpecialTokens
from gpt_arc.finetuning.predictions import predict
from gpt_arc.weights.directory import save_model
from helpers import randomised
from model import GPT, GPTConfig
from tools import export

pytestmark = pytest.mark.slow
INPUTS, TOLERANCE, CPU = 500, 1e-4, torch.device("cpu")
TEXT = "The cat sat on the mat, didn't it? 1234 naïve 漢字 🙂🙃\n\n  indented\ttext . , !"
ROTARY = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False)
SETTINGS = {
    "gpt2": {},
    "gpt2-untied": dict(tied_head=False, activation="relu_squared"),
    "gpt2-unbiased": dict(bias=False),
    "openai-gpt": dict(norm_position="post"),
    "qwen3": dict(n_kv_head=2, qk_norm=True, **ROTARY),
    "llama": dict(n_kv_head=1, **ROTARY),
    "mixtral": dict(n_experts=3, mlp_size=20, **ROTARY),
}
BERT = dict(attention="bidirectional", norm_position="post", embedding_norm=True, head_transform=True, head_bias=True)
BERT |= dict(token_types=2, activation="gelu")
LABELS = {"classification": ("bad", "so-so", "good"), "entailment": ("no", "yes"), "numbers": None}


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([TEXT] * 20, 300)


@pytest.fixture
def exported(stage_runner, tmp_path):
    """Exports tmp_path/ours; returns the folder."""

    def call(*flags):
        shown = stage_runner(export, tmp_path / "ours", tmp_path / "export", *flags)
        assert isinstance(shown, str), shown.message
        return str(tmp_path / "export")

    return call


def trunk(name, vocab_size, block_size=24):
    return GPT(GPTConfig(block_size, vocab_size, **dict(n_layer=2, n_head=4, n_embd=16) | SETTINGS[name]))


def drawn(draw, longest, shortest=0):
    return "".join(draw.choice(TEXT) for _ in range(draw.randrange(shortest, longest + 1)))


def assert_close(kind, ours, theirs, capsys):
    """Asserts that the figures differ by at most TOLERANCE, and prints by how much."""
    assert ours.shape == theirs.shape and ours.isfinite().all()
    largest = (ours - theirs).abs().max().item()
    with capsys.disabled():
        print(f"\n{kind:<32}{len(ours):>6}{largest:>10.1e}", end="")
    assert largest <= TOLERANCE


@pytest.mark.parametrize("name", SETTINGS)
def test_next_token_probabilities(name, tokenizer, exported, tmp_path, capsys):
    model, draw = randomised(trunk(name, 300)), random.Random(0)
    save_model(model, tokenizer, tmp_path / "ours")
    folder = exported()
    texts = [drawn(draw, 12, 1) for _ in range(INPUTS)]
    loaded = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    loaded.pad_token = loaded.eos_token
    batch = loaded(texts, return_tensors="pt", padding=True, truncation=True, max_length=23)
    rows = [tokenizer.encode(text)[:23] for text in texts]
    real, lengths = batch.attention_mask > 0, torch.tensor([len(row) for row in rows])
    assert batch.input_ids[real].tolist() == sum(rows, []) and len(set(lengths.tolist())) > 9
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(pad_rows(rows)).softmax(-1)[real]
        probabilities = theirs(batch.input_ids, attention_mask=batch.attention_mask).logits.softmax(-1)[real]
    assert_close(f"language model, {name}", expected, probabilities, capsys)
    generate = transformers.pipeline("text-generation", folder, do_sample=False, max_new_tokens=1, return_tensors=True)
    short = [text for text, row in zip(texts, rows) if len(row) < 23][:20]
    for text, (answer,) in zip(short, generate(short)):
        tokens = tokenizer.encode(text)
        with torch.no_grad():
            assert answer["generated_token_ids"] == [*tokens, model(torch.tensor([tokens]))[0, -1].argmax().item()]


def test_probabilities_of_a_hidden_token(tokenizer, exported, tmp_path, capsys):
    size, draw = tokenizer.vocab_size + 1, random.Random(4)  # [MASK] is one more token
    model, mask = randomised(GPT(GPTConfig(24, size, 2, 4, 16, **BERT))).eval(), size - 1
    save_model(model, tokenizer, tmp_path / "ours")
    fill = transformers.pipeline("fill-mask", exported(), top_k=size)
    texts = [f"{drawn(draw, 11)}[MASK]{drawn(draw, 11)}" for _ in range(2 * INPUTS)]
    rows = {text: fill.tokenizer(text).input_ids for text in texts}
    texts = [text for text in texts if len(rows[text]) <= 24][:INPUTS]
    assert len(texts) == INPUTS and len({len(rows[text]) for text in texts}) > 9
    expected, scores = [], []
    for text, answers in zip(texts, fill(texts)):
        left, right = text.split("[MASK]")
        before, after = map(tokenizer.encode, (left.rstrip(), right))  # white space before the token belongs to it
        assert rows[text] == [*before, mask, *after]
        with torch.no_grad():
            expected.append(model(torch.tensor([rows[text]]))[0, len(before)].softmax(-1))
        by_token = {each["token"]: each["score"] for each in answers}
        scores.append([by_token[token] for token in range(size)])
    assert_close("hidden token, bert", torch.stack(expected), torch.tensor(scores), capsys)


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("name", SETTINGS)
def test_labels_of_one_text_and_of_two(name, task, tokenizer, exported, tmp_path, capsys):
    labels, count = LABELS[task], 2 if task == "entailment" else 1
    kind, special, draw = "entailment" if count == 2 else "classification", SpecialTokens.after(300), random.Random(1)
    # of two long texts, the tokenizers library gives an odd token to the second: an even number is left for them
    units = dict(mean=5.0, scale=2.0) if labels is None and SETTINGS[name].get("bias", True) else {}
    config = ClassifierConfig(kind, labels, special, Columns.usual(kind), 20 + (count == 2), **units)
    classifier = randomised(Classifier(trunk(name, 303), config), scale=0.2)
    save_classifier(classifier, tokenizer, tmp_path / "ours")
    folder = exported()
    examples = [Example(tuple(drawn(draw, 21 // count) for _ in range(count)), None, "") for _ in range(INPUTS)]
    predicted = predict(classifier, encode_examples(examples, config, tokenizer), 100, CPU, "float32")
    expected = predicted.logits if labels is None else predicted.probabilities
    classify = transformers.pipeline("text-classification", folder, truncation=True, top_k=None)
    answers = classify([dict(zip(("text", "text_pair"), one.texts)) for one in examples], batch_size=100)
    answers = [{one["label"]: one["score"] for one in each} for each in answers]
    scores = [[each[label] for label in labels or ("LABEL_0",)] for each in answers]
    assert_close(f"{task}, {name}", torch.tensor(expected).double(), torch.tensor(scores).double(), capsys)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "gpt2-unbiased", "openai-gpt"])
def test_options(name, tokenizer, exported, tmp_path, capsys):
    special, draw = SpecialTokens.after(300), random.Random(2)
    config = ClassifierConfig("multiple_choice", None, special, Columns.usual("multiple_choice"), 21)
    classifier = randomised(Classifier(trunk(name, 303), config), scale=0.2)
    save_classifier(classifier, tokenizer, tmp_path / "ours")
    folder = exported()
    texts = [tuple(drawn(draw, 11) for _ in range(1 + draw.randrange(2, 5))) for _ in range(INPUTS)]
    encoded = encode_examples([Example(each, None, "") for each in texts], config, tokenizer)
    rows = predict(classifier, encoded, 100, CPU, "float32").probabilities
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    class_name = json.loads((tmp_path / "export" / "config.json").read_text())["architectures"][0]
    theirs = getattr(transformers, class_name).from_pretrained(folder).eval()
    expected, probabilities = [], []
    for count in (2, 3, 4):
        chosen = [number for number, each in enumerate(texts) if len(each) == 1 + count]
        contexts = [texts[number][0] for number in chosen for _ in range(count)]
        options = [option for number in chosen for option in texts[number][1:]]
        batch = loaded(contexts, options, padding=True, truncation=True, return_tensors="pt")
        tokens, real = (batch[key].unflatten(0, (-1, count)) for key in ("input_ids", "attention_mask"))
        with torch.no_grad():  # no attention mask, which OpenAIGPTDoubleHeadsModel can't read: padding is at the end
            logits = theirs(tokens, mc_token_ids=real.sum(-1) - 1).mc_logits
        probabilities.append(logits.softmax(-1).flatten())
        expected += [value for number in chosen for value in rows[number]]
    assert_close(f"multiple choice, {name}", torch.tensor(expected).float(), torch.cat(probabilities), capsys)


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_of_conversations(name, tokenizer, exported, tmp_path, capsys):
    chat, draw = ChatFormat.new(TEMPLATES["chatml"], tokenizer, 300), random.Random(3)
    model = randomised(RewardModel(trunk(name, chat.vocab_size, 256)), scale=0.2)
    torch.nn.init.constant_(model.head.bias, 0.0 if SETTINGS[name].get("bias", True) is False else 0.7)
    save_reward_model(model, tokenizer, chat, tmp_path / "ours")
    folder = exported()
    roles = (("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2)
    rows = [[Turn(role, drawn(draw, 13, 1).strip() or "a") for role in draw.choice(roles)] for _ in range(INPUTS)]
    expected = score_sequences(
        model, [chat.prompt(row[:-1]) + chat.response(row[-1].content) for row in rows], 100, CPU, "float32"
    )
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [[turn._asdict() for turn in row] for row in rows]
    texts = loaded.apply_chat_template(messages, tokenize=False)
    score = transformers.pipeline("text-classification", folder, function_to_apply="none")
    scores = torch.tensor([each["score"] for each in score(texts, batch_size=100)])
    assert_close(f"reward, {name}", expected, scores, capsys)
