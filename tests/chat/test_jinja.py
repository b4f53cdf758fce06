"""The exported chat template: transformers' ids and assistant masks are those that training uses."""

import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gpt_arc.chat.format import ROLES, TEMPLATES, ChatFormat, Template, Turn, load_chat
from gpt_arc.data.declared import MARK
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer
from tools.export import tokenizer_files, with_special_tokens

SAMPLE = '\n\nHuman: {{ it\'s }} {% if %} {# #} \\ "naïve" 漢🙂\t\r\n  <|user|> Assistant:'
TOKENIZERS = {
    "bpe": BPETokenizer.train([SAMPLE] * 20, 320),
    "characters": CharTokenizer.from_text(SAMPLE + "bcdefghijklmnopqrstuvwxyz"),
}
PIECES = ["\n", "\n\n", " ", "  ", "\t", "\r\n", "Human: ", "Assistant:", "it's", '"', "'", "\\", "\\n", "naïve"]
PIECES += ["漢", "🙂", "user", *"{{ }} {% %} {# #} < | > <| |>".split(), "{{ it }}", "{% if %}"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
MARKS = st.sampled_from(["", "", "<|user|>", "<|a|>", "<|b|>"])
SIDE = st.tuples(TEXT, MARKS, TEXT).map("".join)
TURNS = st.lists(st.builds(Turn, st.sampled_from(ROLES), TEXT, st.just(1), st.just(())), min_size=1, max_size=4)


@st.composite
def templates(draw):
    turns = [f"{draw(SIDE)}{{content}}{draw(SIDE)}" for _ in range(2)]
    opening = draw(st.one_of(st.just(""), SIDE))
    end = draw(st.sampled_from(["<|end|>", "<|a|>", "<|endoftext|>"]))
    return Template(*turns, f"{opening}{{content}}{end}{draw(SIDE)}")


def loaded(chat):
    """transformers' tokenizer from our export."""
    files = tokenizer_files(chat.tokenizer, 10**6)
    files = with_special_tokens(files, chat.added, {"chat_template": chat.jinja})
    settings = json.loads(files["tokenizer_config.json"])
    names = {key: settings[key] for key in ("bos_token", "eos_token", "chat_template") if key in settings}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(files["tokenizer.json"]), **names)


def check(chat, turns):
    theirs = loaded(chat)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    output = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    tokens, scored = chat.encode(turns)
    assert output["input_ids"] == tokens
    assert output["assistant_masks"][1:] == [int(learned) for learned in scored[1:]]  # nothing predicts the first
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == chat.prompt(turns)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False).endswith(chat.render(turns))
    if not (turns[0].role == "assistant" and not chat.template.parts("assistant")[0]):
        assert chat.encode_rendered(chat.render(turns)) == prompt


def fuzzed(name, template, turns):
    tokenizer = TOKENIZERS[name]
    chat = ChatFormat.new(template, tokenizer, tokenizer.vocab_size + 2)
    spelled = sum(len(MARK.findall("".join(template.parts(turn.role)))) for turn in turns)
    opening = template.parts("assistant")[0]
    # a mark that a content spells, or completes, is text for us and a mark for transformers
    assume(len(MARK.findall(chat.render(turns))) == spelled + len(MARK.findall(opening)))
    assume(chat.render(turns))  # of nothing we have a start token, transformers has no token
    check(chat, turns)


EXAMPLES = st.sampled_from(sorted(TOKENIZERS)), templates(), TURNS
CHECKS = [HealthCheck.filter_too_much, HealthCheck.too_slow]


@settings(max_examples=60, deadline=None, suppress_health_check=CHECKS, derandomize=True)
@given(*EXAMPLES)
def test_any_template_renders_as_it_is_trained(name, template, turns):
    fuzzed(name, template, turns)


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None, suppress_health_check=CHECKS)
@given(*EXAMPLES)
def test_any_template_renders_as_it_is_trained_at_length(name, template, turns):
    fuzzed(name, template, turns)


HUMAN = Template("{content}", "\n\nHuman: {content}", "\n\nAssistant: {content}<|end|>")


@pytest.mark.parametrize("template", [*TEMPLATES.values(), HUMAN], ids=[*TEMPLATES, "human"])
def test_content_with_edges_of_white_space(template):
    tokenizer = BPETokenizer.train([SAMPLE + "system user assistant"], 300)
    chat = ChatFormat.new(template, tokenizer, 300)
    for content in ("\n\nhello\n", " ", "", "{{ x }}", "\t{% raw %}\n"):
        check(chat, [Turn("system", content), Turn("user", content), Turn("assistant", content), Turn("user", content)])


def test_a_start_token_comes_before_each_conversation(tmp_path):
    """With Metaspace, which puts a space before the first word of a text alone."""
    vocab = {text: id for id, text in enumerate(["<s>", "</s>", "▁", *"abcdefgh:\n"])}
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    chat = ChatFormat.new(Template("{content}\n", "a: {content}\n", "{content}<|end|>"), tokenizer, len(vocab))
    turns = [Turn("user", "ab c"), Turn("assistant", " d"), Turn("user", "e"), Turn("assistant", "h")]
    for conversation in (turns, turns[1:], turns[:1]):
        check(chat, conversation)
        assert chat.encode(conversation)[0][0] == 0
    chat.save(tmp_path)
    assert load_chat(tmp_path, tokenizer) == chat
