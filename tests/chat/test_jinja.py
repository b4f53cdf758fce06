"""The exported chat template: transformers' ids and assistant masks are those that training uses."""

import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gpt_arc.chat.files import read_conversations, read_prompts, read_rankings
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


@settings(max_examples=30, deadline=None, suppress_health_check=CHECKS, derandomize=True)
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


# ---- tools

TOOLS = [{"type": "function", "function": {"name": "add", "description": 'Adds "naïve" numbers', "parameters": {}}}]
ADD = [{"id": "a", "type": "function", "function": {"name": "add", "arguments": {"of": [1, "é"]}}}]
ADD += [{"name": "add", "arguments": '{"of":[2]}'}]
OF_TOOLS = [
    *({"role": "user", "content": "1 + 1, 2 + 2?"}, {"role": "assistant", "content": None, "tool_calls": ADD}),
    *({"role": "tool", "tool_call_id": "a", "content": "2"}, {"role": "tool", "content": "4"}),
    *({"role": "assistant", "content": "2 and 4", "tool_calls": []}, {"role": "user", "content": "More"}),
    *({"role": "assistant", "content": "Well.", "tool_calls": ADD[:1]}, {"role": "tool", "content": "0"}),
    {"role": "assistant", "content": "0"},
]


def turns_of(path, **row):
    path.write_text(json.dumps(row))
    return read_conversations(path)[0].turns


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]], ids=["", "system"])
def test_tools_are_laid_out_as_by_transformers(template, system, tmp_path):
    chat = ChatFormat.new(TEMPLATES[template], TOKENIZERS["bpe"], TOKENIZERS["bpe"].vocab_size)
    theirs, messages = loaded(chat), system + OF_TOOLS
    for tools in (TOOLS, TOOLS * 2, None):
        turns = turns_of(tmp_path / "chats.jsonl", messages=messages, tools=tools)
        output = theirs.apply_chat_template(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
        tokens, scored = chat.encode(turns)
        assert output["input_ids"] == tokens
        assert output["assistant_masks"][1:] == [int(learned) for learned in scored[1:]]
        prompt = theirs.apply_chat_template(messages[:-1], tools, add_generation_prompt=True, return_dict=False)
        assert prompt == chat.prompt(turns[:-1]) == chat.prompt(read_prompts(tmp_path / "chats.jsonl")[0].turns)


def test_chatml_lays_out_tools_as_qwen_does(tmp_path):
    tools = [{"name": "add"}]
    turns = turns_of(tmp_path / "chats.jsonl", messages=OF_TOOLS[:4] + OF_TOOLS[-1:], tools=json.dumps(tools))
    chat = ChatFormat.new(TEMPLATES["chatml"], TOKENIZERS["bpe"], TOKENIZERS["bpe"].vocab_size)
    assert (
        chat.render(turns, continued=True)
        == """<|im_start|>system
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"name": "add"}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
1 + 1, 2 + 2?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "add", "arguments": {"of": [1, "é"]}}
</tool_call>
<tool_call>
{"name": "add", "arguments": {"of":[2]}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
2
</tool_response>
<tool_response>
4
</tool_response><|im_end|>
<|im_start|>assistant
0"""
    )


def test_other_ways_to_write_calls_and_results_mean_the_same(tmp_path):
    call, result = {"name": "add", "arguments": '{"of": [1, "é"]}'}, "<tool_response>\n2\n</tool_response>"
    modern = [OF_TOOLS[0], OF_TOOLS[1] | {"tool_calls": ADD[:1]}, OF_TOOLS[2], OF_TOOLS[-1]]
    former = [modern[0], {"role": "assistant", "function_call": call}]
    former += [{"role": "function", "name": "add", "content": "2"}, modern[-1]]
    shared = [{"from": "human", "value": "1 + 1, 2 + 2?"}, {"from": "function_call", "value": json.dumps(call)}]
    shared += [{"from": "observation", "value": "2"}, {"from": "gpt", "value": "0"}]
    hermes = [*shared[:2], {"from": "tool", "value": result}, shared[-1]]
    rows = [{"messages": modern, "tools": TOOLS}, {"messages": former, "tools": json.dumps(TOOLS)}]
    rows += [{"conversations": each, "tools": TOOLS} for each in (shared, hermes)]
    read = [turns_of(tmp_path / "chats.jsonl", **row) for row in rows]
    assert [turns == read[0] for turns in read] == [True] * 4 and len(read[0]) == 5
    ranked = {"chosen": modern, "rejected": [*modern[:3], modern[1]], "tools": TOOLS}
    (tmp_path / "rankings.jsonl").write_text(json.dumps(ranked))
    (ranking,) = read_rankings(tmp_path / "rankings.jsonl")
    assert ranking.turns == read[0][:-1] and ranking.responses == ("0", read[0][2].content)
