"""Conversations as tokens: templates, masks, files and batches; and the turns of a chat."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gpt_arc.chat.batches import EncodedConversation, conversation_batch, encode_conversations, packed_rows
from gpt_arc.chat.files import Conversation, read_conversations, read_prompts, read_rankings
from gpt_arc.chat.format import TEMPLATES, ChatFormat, Template, Turn, load_chat, load_template
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, LibraryTokenizer, SentencePieceTokenizer
from gpt_arc.decoding.dialogue import Dialogue
from gpt_arc.errors import UserError
from model import GPT, GPTConfig

LETTERS = CharTokenizer("\nabcdef<>|nresu")
WORDS = CharTokenizer.from_text("system user assistant\nabf")  # chatml's roles are text
SYSTEM, ASK, SAY = Turn("system", "f"), Turn("user", "ab"), Turn("assistant", "cde")


def numbers(text):
    return LETTERS.encode(text)


# ---- templates


@pytest.mark.parametrize(
    "opening, spans",
    [("Bot: ", True), ("Bot:", False), ("Bot:\n", False), ("Bot: <|x|>", False), ("", False), ("B", True)],
)
def test_a_template_whose_prompts_end_otherwise_than_in_training_is_refused(opening, spans):
    words = [text for a in "aA1" for text in (f"Bot: {a}", f"B{a}")]
    chat = ChatFormat.new(
        Template("{content}", "{content}\n", opening + "{content}<|end|>"), BPETokenizer.train(words * 9, 290), 290
    )
    prompt, whole = chat.prompt([Turn("user", "b")]), chat.encode([Turn("user", "b"), Turn("assistant", "a")])[0]
    assert (whole[: len(prompt)] != prompt) == spans
    if not spans:
        return chat.check_opening()
    with pytest.raises(UserError, match="a prompt would end otherwise than in training"):
        chat.check_opening()


def test_markers_by_hand():
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, vocab_size=20)  # a model may have more rows than tokens
    assert chat.added == {"<|system|>": 20, "<|user|>": 21, "<|assistant|>": 22, "<|end|>": 23} and chat.end == 23
    tokens, scored = chat.encode([SYSTEM, ASK, SAY, ASK, Turn("assistant", "")])
    assert tokens == [20, 6, 21, 1, 2, 22, 3, 4, 5, 23, 21, 1, 2, 22, 23]
    assert [t for t, s in zip(tokens, scored) if s] == [3, 4, 5, 23, 23] and len(scored) == len(tokens)
    assert chat.prompt([SYSTEM, ASK]) == [20, 6, 21, 1, 2, 22] and chat.prompt([]) == [22]
    assert chat.response("cde") == [3, 4, 5, 23]
    assert chat.decode([3, 4, 5, 23, 1]) == chat.decode([3, 4, 5]) == "cde" and chat.decode([23]) == ""


def test_plain_by_hand():
    chat = ChatFormat.new(TEMPLATES["plain"], LETTERS, vocab_size=15)
    assert chat.added == {"<|endoftext|>": 15} and chat.end == 15
    tokens, scored = chat.encode([SYSTEM, ASK, SAY])
    assert tokens == [6, 0, 0, 1, 2, 0, 3, 4, 5, 15] and scored == [False] * 6 + [True] * 4
    assert chat.prompt([ASK]) == [1, 2, 0]
    # an empty prompt gets a start token to predict the response's first token from, in training too
    assert chat.prompt([]) == [LETTERS.start_token] == [0]
    assert chat.encode([SAY]) == ([0, 3, 4, 5, 15], [False] + [True] * 4)


def test_text_after_a_response_s_end_is_not_scored():
    chat = ChatFormat.new(Template("{content}", "a{content}b", "c{content}<|end|>\nd<|end|>"), LETTERS, 15)
    tokens, scored = chat.encode([ASK, SAY, ASK])
    assert tokens == [1, 1, 2, 2, 3, 3, 4, 5, 15, 0, 4, 15, 1, 1, 2, 2]
    assert [i for i, s in enumerate(scored) if s] == [5, 6, 7, 8]
    assert chat.prompt([ASK, SAY]) == [*tokens[:12], 3]


def test_text_that_spells_a_marker_is_text():
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, 15)
    tokens, scored = chat.encode([Turn("user", "<|user|><|end|>"), Turn("assistant", "<|end|>a")])
    assert tokens == [16, *numbers("<|user|><|end|>"), 17, *numbers("<|end|>a"), 18]
    assert sum(scored) == len("<|end|>a") + 1
    for template in ("plain", "chatml"):
        tokenizer = BPETokenizer.train([], 257)
        chat = ChatFormat.new(TEMPLATES[template], tokenizer, 257)
        spelled = "<|endoftext|><|im_end|>"
        assert chat.encode([Turn("user", spelled)])[0].count(chat.end) == (template == "chatml")
        assert chat.end not in chat.response(spelled)[:-1] and chat.decode(chat.response(spelled)) == spelled
    assert ChatFormat.new(TEMPLATES["plain"], tokenizer, 257).end == tokenizer.end_of_text  # already a token


def library_tokenizer(special):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, special=True) for text in special])
    return LibraryTokenizer(library.to_str().encode())


def test_chatml_equals_transformers():
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = library_tokenizer(["<|im_start|>", "<|im_end|>"])
    chat = ChatFormat.new(TEMPLATES["chatml"], tokenizer, tokenizer.vocab_size)
    assert chat.added == {} and chat.end == tokenizer.special_token("<|im_end|>")
    reference = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(tokenizer.files()["tokenizer.json"]))
    reference.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [
        Turn("system", "Be brief."), Turn("user", "Name a colour, naïf!"), Turn("assistant", "Red.\n\nOr 紅."),
        Turn("user", " And?"),
    ]  # fmt: skip
    messages = [turn._asdict() for turn in turns]
    assert chat.encode(turns)[0] == reference.apply_chat_template(messages, return_dict=False)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.prompt(turns) == expected
    scored = [t for t, s in zip(*chat.encode(turns)) if s]
    assert tokenizer.decode(scored) == "Red.\n\nOr 紅.<|im_end|>"


def test_templates_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {"system": "S{content}", "user": "U{content}", "assistant": "A{content}<|x|>"}
    Path("mine.toml").write_text("".join(f"{role} = '{text}'\n" for role, text in texts.items()))
    assert load_template("mine.toml") == Template(**texts) and load_template("plain") is TEMPLATES["plain"]
    cases = {
        "none.toml": "template = none.toml is neither a .toml file nor one of markers, chatml, plain",
        "a = ": "bad.toml is not valid TOML",
        "user = '{content}'": "bad.toml has user: a template needs a text for system, user, assistant",
        "system='{content}'\nuser='{content}'\nassistant='{content}'": "assistant = '{content}' must have a <|token|>",
        "system='{content}'\nuser='x'\nassistant='{content}<|e|>'": "bad.toml: the template's user = 'x' must be a te",
        "system=1\nuser='{content}'\nassistant='{content}<|e|>'": "the template's system = 1 must be a text",
        "system='{content}{content}'\nuser='{content}'\nassistant='{content}<|e|>'": "that contains {content} once",
    }
    for content, message in cases.items():
        Path("bad.toml").write_text(content)
        with pytest.raises(UserError) as refused:
            load_template(content if content.endswith(".toml") else "bad.toml")
        assert message in str(refused.value)
    with pytest.raises(UserError, match="the template's text 'U': the character 'U'"):
        ChatFormat.new(load_template("mine.toml"), CharTokenizer("AS"), 2)


# ---- chat.json


def test_a_format_is_saved_and_loaded(tmp_path):
    turns = [SYSTEM, ASK, Turn("assistant", "ba")]
    for template in TEMPLATES.values():
        chat = ChatFormat.new(template, WORDS, 20)
        chat.save(tmp_path)
        loaded = load_chat(tmp_path, WORDS)
        assert loaded == chat and loaded.encode(turns) == chat.encode(turns)
        assert loaded != ChatFormat.new(template, WORDS, 21)
    assert load_chat(tmp_path / "nowhere", LETTERS) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "chat.json: it has version 2; this program reads 1"),
        ({"added_tokens": {}}, "chat.json: the template's <|system|> is not a token of the tokenizer"),
        ({"added_tokens": [1]}, "chat.json is damaged: added_tokens = [1]"),
        ({"added_tokens": {"<|user|>": "7"}}, 'chat.json is damaged: added_tokens.<|user|> = "7"'),
        ({"added_tokens": {"<|system|>": 3, "<|user|>": 4, "<|assistant|>": 5, "<|end|>": 6}}, "don't follow the tok"),
        ({"added_tokens": {"<|system|>": 20, "<|user|>": 21, "<|assistant|>": 22, "<|end|>": 22}}, "don't follow"),
        ({"template": {"user": "a"}}, "chat.json is damaged: it lacks template.system"),
        ({"template": asdict(TEMPLATES["markers"]) | {"user": "a"}}, "the template's user = 'a' must be"),
        (None, "chat.json is damaged: it is not JSON"),
    ],
)
def test_a_damaged_chat_json_is_refused(tmp_path, change, message):
    ChatFormat.new(TEMPLATES["markers"], LETTERS, 20).save(tmp_path)
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else "{")
    with pytest.raises(UserError) as refused:
        load_chat(tmp_path, LETTERS)
    assert message in str(refused.value)


# ---- fitting a context


def conversation_of(draw, exchanges):
    turns = [Turn("system", "f" * draw.randrange(4))] * draw.randrange(2)
    for _ in range(exchanges):
        turns += [Turn("user", "a" * draw.randrange(6)), Turn("assistant", "b" * draw.randrange(6))]
    return turns


@pytest.mark.parametrize("template", TEMPLATES)
def test_latest_keeps_the_most_turns_that_fit(template):
    """Against every way to drop whole exchanges, oldest first."""
    draw = random.Random(0)
    chat = ChatFormat.new(TEMPLATES[template], WORDS, 20)
    outcomes = set()
    for _ in range(300):
        turns = [*conversation_of(draw, draw.randrange(4)), Turn("user", "a" * draw.randrange(6))]
        room = draw.randrange(5, 90)
        system = [turn for turn in turns if turn.role == "system"]
        exchanges = turns[len(system) :]
        ways = [system + exchanges[start:] for start in range(0, len(exchanges), 2)]
        fitting = [way for way in ways if len(chat.prompt(way)) <= room]
        outcomes.add(len(ways) - len(fitting))
        if fitting:
            assert chat.latest(turns, room) == fitting[0]
        else:
            with pytest.raises(UserError, match=f"are more than the {room} that the context leaves"):
                chat.latest(turns, room)
    assert outcomes >= {0, 1, 2, 3}


def test_a_long_conversation_keeps_its_first_responses():
    """Against every cut after a response."""
    draw, chat = random.Random(1), ChatFormat.new(TEMPLATES["chatml"], WORDS, 20)
    turns = [conversation_of(draw, draw.randrange(1, 4)) + [Turn("user", "a")] * draw.randrange(2) for _ in range(200)]
    conversations = [Conversation(tuple(each), "a, line 1", {}) for each in turns]
    context = 36
    examples, cut, dropped = [], 0, 0
    for each in turns:
        responses = [i for i, turn in enumerate(each) if turn.role == "assistant"]
        ways = []
        for end in responses:
            tokens = chat.prompt(each[:end]) + chat.response(each[end].content)
            if len(tokens) - 1 <= context:  # the last token isn't read
                ways.append((tokens, sum(len(each[i].content) + 1 for i in responses if i <= end)))
        cut += 0 < len(ways) < len(responses)
        dropped += not ways
        examples += ways[-1:]
    encoded = encode_conversations(conversations, chat, context)
    assert [(example.tokens, example.count) for example in encoded.examples] == examples
    assert (encoded.cut, encoded.dropped) == (cut, dropped) and cut > 10 and dropped > 10


def test_an_unknown_character_is_named_with_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "X"}\n')
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, 15)
    with pytest.raises(UserError, match=r"a.jsonl, line 2: the character 'X'"):
        encode_conversations(read_conversations(tmp_path / "a.jsonl"), chat, 100)


# ---- files


def read(reader, tmp_path, *rows, name="rows.jsonl"):
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    return reader(tmp_path / name)


MESSAGES = [dict(role=turn.role, content=turn.content, weight=turn.weight) for turn in (SYSTEM, ASK, SAY)]
QUESTION = {"messages": MESSAGES[:2]}


def test_conversations_and_prompts_in_both_forms(tmp_path):
    rows = [
        {"messages": MESSAGES, "source": "x"},
        {"prompt": "ab", "response": "cde", "system": "f"},
        {"prompt": "ab", "response": "", "system": ""},
        {"prompt": 7, "response": 1.5, "system": float("nan"), "weight": 1.0, "history": []},
    ]
    messages, with_system, empty, numeric = read(read_conversations, tmp_path, *rows)
    assert messages.turns == with_system.turns == (SYSTEM, ASK, SAY) and messages.row == rows[0]
    assert empty.turns == (ASK, Turn("assistant", "")) and numeric.turns[0].content == "7"
    assert with_system.place == f"{tmp_path}/rows.jsonl, line 2"
    prompts = read(read_prompts, tmp_path, *rows, QUESTION, {"prompt": "ab"})
    assert [each.turns for each in prompts[:2]] == [(SYSTEM, ASK)] * 2 == [prompts[4].turns] * 2
    assert prompts[5].turns == (ASK,) and prompts[5].row == {"prompt": "ab"}
    table = 'prompt,response\nab,"c\nd"\nab,\n'
    assert [each.turns[1].content for each in read(read_conversations, tmp_path, table, name="a.csv")] == ["c\nd", ""]
    table = "prompt\tresponse\tsystem\nab\tcde\tf\n"
    assert read(read_conversations, tmp_path, table, name="a.tsv")[0].turns == (SYSTEM, ASK, SAY)


def test_rankings(tmp_path):
    rows = [
        QUESTION | {"chosen": "c", "rejected": "d"},
        {"prompt": "ab", "responses": ["c", "d", "e"]},
        {"prompt": "ab", "responses": ["c", "d", "e"], "ranks": [2, 1, 2]},
        {"prompt": "ab", "responses": ["c", "d"], "ranks": [0.5, 0.5]},
    ]
    pair, ordered, with_ties, tie = read(read_rankings, tmp_path, *rows)
    assert pair.turns == (SYSTEM, ASK) and pair.responses == ("c", "d") and pair.pairs() == [(0, 1)]
    assert ordered.pairs() == [(0, 1), (0, 2), (1, 2)]
    assert with_ties.pairs() == [(1, 0), (1, 2)] and tie.pairs() == []
    table = "prompt,chosen,rejected\nab,c,d\n"
    assert read(read_rankings, tmp_path, table, name="a.csv")[0].pairs() == [(0, 1)]


def test_a_response_of_weight_0_is_read_and_not_learned(tmp_path):
    said = {"role": "assistant", "content": "cde"}
    rows = [
        {"messages": [MESSAGES[1], said | {"weight": weight, "name": None}, MESSAGES[1], said]} for weight in (0, 1)
    ]
    conversations = read(read_conversations, tmp_path, *rows)
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, 15)
    skipped, learned = encode_conversations(conversations, chat, 100).examples
    assert skipped.tokens == learned.tokens and learned.scored == [
        *skipped.scored[:4],
        *[True] * 4,
        *skipped.scored[8:],
    ]
    assert skipped.count == 4 and skipped.scored[-4:] == [True] * 4
    assert encode_conversations(conversations, chat, 8).dropped == 1  # nothing to learn is left of the first one


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_conversations, {"prompt": "a"}, "there is no column response; the columns are: prompt"),
        (read_conversations, {"prompt": "a", "response": None}, "response is empty"),
        (read_conversations, {"prompt": ["a"], "response": "b"}, 'prompt = ["a"] is not a text'),
        (read_conversations, {"prompt": "a", "response": "b", "system": 3 == 3}, "system = true is not a text"),
        (read_conversations, {"messages": []}, "messages is not a list of turns"),
        (read_conversations, {"messages": "hello"}, "messages is not a list of turns"),
        (read_conversations, QUESTION, "messages has no assistant turn to learn from"),
        (read_conversations, {"messages": [{"role": "bot", "content": "x"}]}, 'the turn {"role": "bot", "content": "x'),
        (read_conversations, {"messages": [{"role": "user"}]}, 'the turn {"role": "user"} is not {"role": system | us'),
        (read_conversations, {"messages": ["hello"]}, 'the turn "hello" is not'),
        (
            read_conversations,
            {"messages": [MESSAGES[1], MESSAGES[2] | {"weight": 0}]},
            "has no assistant turn to learn",
        ),
        (read_conversations, {"messages": [MESSAGES[1], MESSAGES[2] | {"weight": 2}]}, "has weight = 2: it may be 1"),
        (read_conversations, {"messages": [MESSAGES[1] | {"weight": 0}, MESSAGES[2]]}, "has weight = 0: it may be 1"),
        (
            read_conversations,
            {"messages": [MESSAGES[1], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            'the call {} is not {"name": NAME, "arguments": OBJECT}, alone or as function',
        ),
        (
            read_conversations,
            {"messages": [MESSAGES[1], {"role": "assistant", "function_call": {"name": "f", "arguments": "[1]"}}]},
            'the call {"name": "f", "arguments": "[1]"} is not',
        ),
        (read_conversations, {"conversations": [{"from": "function_call", "value": "f(1)"}]}, "the call null is not"),
        (
            read_conversations,
            {"messages": [*MESSAGES, {"role": "tool", "content": ["4"]}]},
            'the turn {"role": "tool", "content": ["4"]} is not',
        ),
        (
            read_conversations,
            {"messages": [*MESSAGES, {"role": "tool", "content": "4", "image": "x"}]},
            "has image, which can't be learned",
        ),
        (read_prompts, {"messages": [MESSAGES[1] | {"name": "x"}]}, "has name, which can't be learned"),
        (read_rankings, {"messages": [MESSAGES[1] | {"x": 1}], "chosen": "a", "rejected": "b"}, "has x, which can't"),
        (
            read_conversations,
            {"messages": MESSAGES, "response": "x"},
            "the column response can't stand beside",
        ),
        (
            read_conversations,
            {"messages": MESSAGES, "tools": "add"},
            'tools = "add" is not a list of objects, or JSON of one',
        ),
        (read_conversations, {"messages": MESSAGES, "tools": ["add"]}, r'tools = ["add"] is not a list of objects'),
        (
            read_conversations,
            {"messages": MESSAGES, "functions": [{}]},
            "the column functions can't stand beside messages: name it by --columns tools=functions",
        ),
        (read_conversations, "[1]\n", "the line is not a JSON object"),
        (read_prompts, {"messages": MESSAGES[:1]}, "messages must end with a user turn or a response"),
        (read_prompts, {"messages": MESSAGES[2:]}, "messages must end with a user turn or a response"),
        (read_prompts, {"text": "a"}, "there is no column prompt; the columns are: text"),
        (read_rankings, {"messages": MESSAGES, "chosen": "c", "rejected": "d"}, "messages must end with a user turn"),
        (read_rankings, {"prompt": "a", "chosen": "c"}, "there is no column rejected"),
        (
            read_rankings,
            {"prompt": "a", "responses": ["c"]},
            "1 response with 1 rank: a ranking needs two or more responses",
        ),
        (read_rankings, {"prompt": "a", "responses": ["c", 1]}, 'responses = ["c", 1] is not a list of texts'),
        (read_rankings, {"prompt": "a", "responses": ["c", "d"], "ranks": [1]}, "2 responses with 1 rank:"),
        (
            read_rankings,
            {"prompt": "a", "responses": ["c", "d"], "ranks": [1, True]},
            "ranks = [1, true] is not a list",
        ),
        (
            read_rankings,
            {"prompt": "a", "responses": ["c", "d"], "ranks": [1, float("nan")]},
            "ranks = [1, null] is not",
        ),
        (read_rankings, {"prompt": "a", "chosen": "c", "rejected": "d", "ranks": [2, 1]}, "can't stand beside chosen"),
        (read_rankings, {"prompt": "a", "responses": ["c", "d"], "rejected": "d"}, "rejected can't stand beside"),
        (
            read_rankings,
            {"prompt": "a", "chosen": MESSAGES[2] | {"weight": 0}, "rejected": "d"},
            "chosen has weight = 0",
        ),
        (read_rankings, {"prompt": "a", "chosen": "c", "rejected": "d", "weight": 0}, "the column weight = 0 can't be"),
        (read_conversations, {"prompt": "a", "response": "b", "weight": 0}, "the column weight = 0 can't be learned"),
        (
            read_conversations,
            {"instruction": "a", "output": "b", "tools": [{}]},
            "the column tools = [{}] is only read beside messages",
        ),
        (read_rankings, {"prompt": "a", "chosen": "c", "rejected": "d", "tools": "[{}]"}, "is only read beside"),
        (read_prompts, {"prompt": "a", "tools": [{}]}, "the column tools = [{}] is only read beside messages"),
        (read_conversations, {"messages": MESSAGES, "weight": 0.5}, "the column weight = 0.5 can't be learned"),
        (
            read_conversations,
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            'history = [["c", "d"]] can',
        ),
        (
            read_conversations,
            {"prompt": "a", "response": "b", "functions": [{}]},
            "the column functions = [{}] can't be learned",
        ),
        (read_conversations, {"prompt": "a", "response": float("nan")}, "response is empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path, reader, row, message):
    good = {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}
    with pytest.raises(UserError) as refused:
        read(reader, tmp_path, good, row, good)
    assert str(refused.value).startswith(f"{tmp_path}/rows.jsonl, line 2: ") and message in str(refused.value)


def test_missing_empty_and_unsupported_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no examples"):
        read(read_conversations, tmp_path)
    with pytest.raises(UserError, match="there is no file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"are read from .jsonl, .json, .csv, .tsv, .parquet files"):
        read_conversations(tmp_path / "a.txt")


# ---- files as people have them

ALPACA = {"instruction": "ab", "input": "", "output": "cde", "system": "f"}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "f"},
        {"from": "human", "value": "ab"},
        {"from": "gpt", "value": "cde"},
    ]
}


@pytest.mark.parametrize("row", [ALPACA, SHAREGPT, {"messages": SHAREGPT["conversations"], "prompt": None}])
def test_alpaca_and_sharegpt_rows_are_the_same_conversation(tmp_path, row):
    (conversation,) = read(read_conversations, tmp_path, row)
    assert conversation.turns == (SYSTEM, ASK, SAY) and conversation.row == row
    assert read(read_prompts, tmp_path, row)[0].turns == (SYSTEM, ASK)
    turns = row.get("conversations") or row.get("messages")
    context = {"messages": turns[:-1]} if turns else row
    assert read(read_rankings, tmp_path, context | {"chosen": "c", "rejected": "d"})[0].turns == (SYSTEM, ASK)


def test_alpaca_s_input_follows_the_instruction(tmp_path):
    (conversation,) = read(read_conversations, tmp_path, ALPACA | {"input": "f"})
    assert conversation.turns[1] == Turn("user", "ab\n\nf")


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
def test_rows_of_json_and_parquet_files(tmp_path, name):
    rows = [{"messages": MESSAGES}, SHAREGPT, ALPACA]
    if name == "rows.json":
        (tmp_path / name).write_text(json.dumps(rows, indent=1))
        assert [c.place for c in read_conversations(tmp_path / name)] == [
            f"{tmp_path}/{name}, item {i}" for i in (1, 2, 3)
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [dict.fromkeys(rows[0] | rows[1] | rows[2]) | row for row in rows]
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), tmp_path / name)
    conversations = read_conversations(tmp_path / name)
    assert [conversation.turns for conversation in conversations] == [(SYSTEM, ASK, SAY)] * 3
    assert conversations[2].place.endswith("3")
    with pytest.raises(UserError, match=f"{name}, (line|row) 1: there is no column chosen"):
        read_rankings(tmp_path / name)


def test_a_damaged_parquet_file_and_a_value_without_a_json_form_are_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": b"a", "response": "b"}]), path)
    with pytest.raises(UserError, match="a.parquet, row 1: prompt = .* is not a text"):
        read_conversations(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="a.parquet can't be read as parquet: "):
        read_conversations(path)
    with pytest.raises(UserError, match="there is no file .*b.parquet"):
        read_conversations(tmp_path / "b.parquet")


def test_rankings_of_whole_conversations(tmp_path):
    """As in UltraFeedback; and with the last turns alone, as in ShareGPT's preferences."""
    whole = {name: [*MESSAGES[:2], {"role": "assistant", "content": name[0]}] for name in ("chosen", "rejected")}
    turns = {name: {"from": "gpt", "value": name[0]} for name in ("chosen", "rejected")}
    rows = [whole, whole | {"prompt": "ab"}, QUESTION | turns, QUESTION | {n: [turn] for n, turn in turns.items()}]
    for ranking in read(read_rankings, tmp_path, *rows):
        assert ranking.turns == (SYSTEM, ASK) and ranking.responses == ("c", "r")


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_conversations, ALPACA | {"prompt": "x"}, "columns prompt and instruction both hold a prompt: choose one"),
        (read_conversations, SHAREGPT | {"messages": MESSAGES}, "columns messages and conversations both hold"),
        (read_conversations, SHAREGPT | {"system": "x"}, "the column system can't stand beside conversations"),
        (
            read_conversations,
            {"conversations": [{"from": "tool", "value": "x"}]},
            "has no assistant turn to learn from",
        ),
        (read_conversations, {"conversations": [{"from": "human"}]}, 'the turn {"from": "human"} is not'),
        (read_conversations, {"conversations": [{"from": ["gpt"], "value": "x"}]}, 'the turn {"from": ["gpt"]'),
        (
            read_conversations,
            {"conversations": [{"from": "gpt", "content": "x"}]},
            'the turn {"from": "gpt", "content"',
        ),
        (
            read_conversations,
            {"instruction": "a", "response": "b"},
            "there is no column output; the columns are: instr",
        ),
        (
            read_rankings,
            {"chosen": [*MESSAGES], "rejected": MESSAGES[1:]},
            "chosen and rejected differ before their last turns",
        ),
        (read_rankings, {"chosen": MESSAGES, "rejected": MESSAGES, "prompt": "x"}, "prompt is not the last user turn"),
        (read_rankings, {"prompt": "x", "chosen": MESSAGES[1], "rejected": "b"}, "chosen must be a text, or end with"),
        (read_rankings, {"prompt": "x", "chosen": [], "rejected": "b"}, "chosen must be a text, or end with"),
        (
            read_rankings,
            {"prompt": "a", "chosen": "c", "rejected": "d", "responses": ["c", "d"]},
            "the column chosen can't stand beside responses",
        ),
    ],
)
def test_an_ambiguous_row_is_named(tmp_path, reader, row, message):
    with pytest.raises(UserError) as refused:
        read(reader, tmp_path, row)
    assert str(refused.value).startswith(f"{tmp_path}/rows.jsonl, line 1: ") and message in str(refused.value)


@pytest.mark.parametrize(
    ("columns", "row", "content"),
    [
        (["prompt=question", "response=answer"], {"question": "q", "answer": "a"}, ("q", "a")),
        (["prompt=response", "response=prompt"], {"prompt": "a", "response": "q"}, ("q", "a")),
        (["output=response", "input=context"], {"instruction": "q", "response": "a", "context": "c"}, ("q\n\nc", "a")),
        (["prompt=prompt"], {"prompt": "q", "response": "a", "instruction": "x", "output": "y"}, ("q", "a")),
        (["instruction=instruction"], {"prompt": "x", "instruction": "q", "output": "a"}, ("q", "a")),
        (["messages=turns"], {"turns": MESSAGES[1:], "prompt": "x", "response": "y"}, ("ab", "cde")),
    ],
)
def test_columns_are_mapped_and_choose_the_form(tmp_path, columns, row, content):
    (conversation,) = read(lambda path: read_conversations(path, columns), tmp_path, row)
    assert tuple(turn.content for turn in conversation.turns) == content and conversation.row == row


def test_a_mapped_input_may_be_missing_in_some_rows(tmp_path):
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", "context": "c"}]
    short, long = read(lambda path: read_conversations(path, ["input=context"]), tmp_path, *rows)
    assert (short.turns[0].content, long.turns[0].content) == ("q", "q\n\nc")
    with pytest.raises(UserError, match=r"rows.jsonl: columns = input=contxt, and no row has contxt"):
        read(lambda path: read_conversations(path, ["input=contxt"]), tmp_path, *rows)


def test_an_empty_cell_is_no_second_form(tmp_path):
    table = "prompt,response,instruction,output\nab,cde,,\n,,ab,cde\n"
    assert [each.turns for each in read(read_conversations, tmp_path, table, name="a.csv")] == [(ASK, SAY)] * 2


def test_a_wrong_mapping_is_refused(tmp_path):
    with pytest.raises(UserError, match="line 1: there is no column topic; the columns are: question"):
        read(lambda path: read_conversations(path, ["prompt=topic"]), tmp_path, {"question": "a"})
    for wrong in ("prompt", "prompt=", "question=prompt"):
        with pytest.raises(UserError, match=f"columns = {wrong.strip('=')} is not NAME=COLUMN; the names are messages"):
            read_conversations(tmp_path / "rows.jsonl", [wrong])


# ---- batches


def test_packing_keeps_conversations_whole_and_never_overfills():
    draw = random.Random(0)
    for _ in range(200):
        size = draw.randrange(5, 30)
        lengths = [draw.randrange(1, size + 1) for _ in range(draw.randrange(1, 30))]
        rows = packed_rows(lengths, size)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        filled = [sum(lengths[i] for i in row) for row in rows]
        assert max(filled) <= size
        # at most one row is half full or less: a second would have gone into the first
        assert sum(2 * each <= size for each in filled) <= 1
    assert packed_rows([3, 4, 2, 5], 7) == [[3, 2], [1, 0]]


def examples_of(draw, count, vocab, longest):
    examples = []
    for _ in range(count):
        length = draw.randrange(2, longest + 2)
        scored = [False, *(draw.random() < 0.6 for _ in range(length - 1))]
        examples.append(EncodedConversation([draw.randrange(vocab) for _ in range(length)], scored))
    return examples


def test_a_batch_by_hand():
    examples = [
        EncodedConversation([1, 2, 3], [False, True, False]),
        EncodedConversation([4, 5, 6, 7], [False, False, True, True]),
    ]
    tokens, targets, _, _ = conversation_batch(examples, None)
    assert tokens.tolist() == [[1, 2, 0], [4, 5, 6]] and targets.tolist() == [[2, -1, -1], [-1, 6, 7]]
    tokens, targets, documents, _ = conversation_batch([*examples, EncodedConversation([8, 9], [False, True])], 5)
    assert tokens.tolist() == [[4, 5, 6, 1, 2], [8, 0, 0, 0, 0]]
    assert targets.tolist() == [[-1, 6, 7, 2, -1], [9, -1, -1, -1, -1]]
    assert documents.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]


GENERATIONS = {
    "gpt1": {"norm_position": "post", "init": "gpt1", "activation": "gelu"},
    "gpt2": {},
    "gpt3": {"attention_band": 3},
    "banded rotary": {"attention_band": 5, "positions": "rotary", "n_kv_head": 1},
    "sinusoidal": {"positions": "sinusoidal", "tied_head": False, "head_bias": True, "activation": "relu"},
    "modern": {
        "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "qk_norm": True,
        "bias": False, "tied_head": False, "head_size": 6, "attention_band": 4,
    },
    "relu squared": {"activation": "relu_squared", "n_kv_head": 2, "norm_position": "post", "norm": "rmsnorm"},
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_packing_changes_no_loss_and_no_gradient(generation, checkpointing):
    """Packed, padded and one by one, in float64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(24, 11, 2, 4, 16, **GENERATIONS[generation])).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.activation_checkpointing = checkpointing
    examples = examples_of(random.Random(2), 12, 11, 24)
    assert conversation_batch(examples, 24)[0].size(0) < 12

    def outcome(*batches):
        losses = [model(*batch) for batch in batches]
        total = sum(loss.total for loss in losses)
        gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        return total, sum(loss.count for loss in losses), [g for g in gradients if g is not None]

    singly = outcome(*(conversation_batch([example], None) for example in examples))
    assert singly[1] == sum(example.count for example in examples)
    for together in (outcome(conversation_batch(examples, 24)), outcome(conversation_batch(examples, None))):
        torch.testing.assert_close(together, singly, rtol=1e-9, atol=1e-11)


# ---- dialogues


def write_answer(answer, chat, text):
    for token in chat.response(text):
        answer.add(token, 0.0, 0.0)


def test_a_dialogue_continues_and_forgets(capsys):
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, 15)
    dialogue = Dialogue(chat, context=30, max_new_tokens=10, system="f")
    assert dialogue.room == 20 and Dialogue(chat, 30, 500).room == 15
    answer = dialogue.ask("ab")
    assert answer.prompt_tokens == chat.prompt([SYSTEM, ASK]) and answer.prompt == "ab"
    write_answer(answer, chat, "cde")
    assert answer.text == "cde" and answer.ended and answer.tokens == chat.response("cde")
    assert dialogue.turns == [SYSTEM, ASK, SAY]
    answer_2 = dialogue.ask("e")
    assert answer_2.prompt_tokens == chat.prompt([SYSTEM, ASK, SAY, Turn("user", "e")])
    answer_2.add(3, 0.0, 0.0)  # then it is interrupted
    assert not capsys.readouterr().err
    answer_3 = dialogue.ask("aaaaaa")  # 23 tokens with the whole history
    assert answer_3.prompt_tokens == chat.prompt(
        [SYSTEM, Turn("user", "e"), Turn("assistant", "c"), Turn("user", "aaaaaa")]
    )
    assert capsys.readouterr().err == "dropped the oldest turns: the context is 30 tokens\n"
    for text, message in (
        ("a" * 17, "the 21 tokens of the system turn and the last are more than the 20 that"),
        ("X", "the character 'X'"),
    ):
        before = dialogue.turns
        with pytest.raises(UserError, match=message):
            dialogue.ask(text)
        assert dialogue.turns == before
    write_answer(answer_3, chat, "cdecde")
    assert len(dialogue.ask("a" * 16).prompt_tokens) == 20 and not capsys.readouterr().err  # reported once
    with pytest.raises(UserError, match="take 20 of the 20 tokens for a prompt"):
        Dialogue(chat, 30, 10, system="f" * 17)
    with pytest.raises(UserError, match="the character 'X'"):
        Dialogue(chat, 30, 10, system="X")


def test_an_answer_is_decoded_separately_from_its_prompt(sentencepiece_model):
    """Some tokenizers drop the space before a text's first word, but not after a prompt."""
    chat = ChatFormat.new(TEMPLATES["markers"], SentencePieceTokenizer(sentencepiece_model), 80)
    answer = Dialogue(chat, 64, 16).ask("2 times 3")
    write_answer(answer, chat, "is 6 times 1")
    assert answer.text == "is 6 times 1" == chat.decode(answer.tokens)


def test_an_answer_ends_at_end_of_text_or_the_stop_text():
    tokenizer = BPETokenizer.train([], 257)
    chat = ChatFormat.new(TEMPLATES["markers"], tokenizer, 257)
    answer = Dialogue(chat, 64, 16).ask("hello", stop="stop")
    for token in (*tokenizer.encode("fine"), tokenizer.end_of_text, *tokenizer.encode("more")):
        answer.add(token, 0.0, 0.0)
    assert answer.text == "fine" and answer.ended
    answer = Dialogue(chat, 64, 16).ask("hello", stop="stop")
    for token in tokenizer.encode("don't stop"):
        answer.add(token, 0.0, 0.0)
    assert answer.text == "don't " and answer.ended
