"""Streamed text against decoding the whole text: shown text is never taken back, and nothing is held back for long."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference

from gpt_arc.data.text_stream import TextStream
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, LibraryTokenizer, SentencePieceTokenizer
from gpt_arc.decoding.screen import Continuation, Screen
from gpt_arc.errors import UserError

CORPUS = [
    "The cat sat on the mat, didn't it? ",
    "naïve Ünïcödé 漢字 🙂🙃 e\u0301 ",
    "👩\u200d👩\u200d👧 안녕 こんにちは\n",
] * 20
SAMPLES = [
    "🙂",
    "👩\u200d👧",
    "e\u0301",
    "漢字",
    "안녕",
    "\ufffd",
    "é",
    " ",
    "\n",
    "  ",
    "cat",
    " the",
    "x",
    "0",
    "\u2028",
]
TEXT = st.lists(st.sampled_from(SAMPLES) | st.text(st.characters(exclude_categories=("Cs",)), max_size=3), max_size=12)
TEXT = TEXT.map("".join)
UNFINISHED = "\ufffd"


def library(model, trainer, *, before, after, **settings):
    """A tokenizer of the library's, trained on CORPUS."""
    tokenizer = Reference(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = before, after
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return LibraryTokenizer(tokenizer.to_str().encode())


@pytest.fixture(scope="module")
def tokenizers(sentencepiece_model):
    """Every kind of tokenizer, by name."""
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=300, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False, character_coverage=0.98,
    )  # fmt: skip
    bytes_of_llama = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "▁": 257, "a": 258, "▁a": 259}
    llama = Reference(models.BPE(bytes_of_llama, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    by_name = {
        "characters": CharTokenizer.from_text("".join([*CORPUS, *SAMPLES])),
        "bpe": BPETokenizer.train(CORPUS, 300),
        "sentencepiece": SentencePieceTokenizer(sentencepiece_model),
        "sentencepiece with bytes": SentencePieceTokenizer(written.getvalue()),
        "words as gpt1's": library(
            models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
            trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>"),
            before=pre_tokenizers.BertPreTokenizer(),
            after=decoders.BPEDecoder(suffix="</w>"),
        ),
        "bytes as qwen's": library(
            models.BPE(),
            trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
            before=pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\p{N}|\s*\p{L}+|\s+"), "isolated"),
                    pre_tokenizers.ByteLevel(False, use_regex=False),
                ]
            ),
            after=decoders.ByteLevel(),
        ),
        "bytes as llama's": LibraryTokenizer(llama.to_str().encode()),
    }
    try:
        by_name["gpt2"] = BPETokenizer.gpt2()
    except UserError:  # its merges can be downloaded but aren't shipped
        pass
    return by_name


KINDS = [
    "characters", "bpe", "gpt2", "sentencepiece", "sentencepiece with bytes", "words as gpt1's", "bytes as qwen's",
    "bytes as llama's",
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the sentencepiece library
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    if request.param not in tokenizers:
        pytest.skip("GPT-2's merges are not at hand")
    return tokenizers[request.param]


def encoded(tokenizer, text):
    if isinstance(tokenizer, CharTokenizer):
        text = "".join(character for character in text if character in tokenizer.characters)
    return tokenizer.encode(text)


def check_stream(tokenizer, prompt, tokens):
    """Pushes tokens one by one: the certain text only grows, is never late, and ends as the text of all tokens."""
    before = tokenizer.decode(prompt)

    def text_of(count):
        whole = tokenizer.decode([*prompt, *tokens[:count]])
        assert whole.startswith(before)
        return whole[len(before) :]

    stream = TextStream(tokenizer, prompt)
    shown = [""]
    for count, token in enumerate(tokens, 1):
        stream.push(token)
        assert not stream.ended and not stream.complete
        shown.append(stream.certain)
        assert stream.certain.startswith(text_of(count).rstrip(UNFINISHED))
    stream.end()
    assert stream.text == stream.certain == text_of(len(tokens)) and stream.complete and not stream.ended
    for earlier, later in zip(shown, [*shown[1:], stream.text]):
        assert later.startswith(earlier)


@FUZZ
@given(prompt=TEXT, text=TEXT)
@example(prompt="the", text=" cat 漢字🙂\ufffd\ufffd e\u0301👩\u200d👧")
@example(prompt="漢字漢字", text="漢字漢字漢字 cat")
def test_encoded_text_streams_back_piece_by_piece(tokenizer, prompt, text):
    check_stream(tokenizer, encoded(tokenizer, prompt), encoded(tokenizer, text))


@FUZZ
@given(prompt=TEXT, data=st.data())
def test_any_tokens_stream_as_they_decode(request, tokenizer, prompt, data):
    if "llama" in request.node.name:
        return  # the library decodes a run of bytes as a whole: an invalid one spoils those before it
    ids = st.integers(0, tokenizer.vocab_size - 1).filter(lambda token: token != tokenizer.end_of_text)
    if isinstance(tokenizer, SentencePieceTokenizer):  # control tokens have no text and may change a first word's space
        ids = ids.filter(lambda token: token > 2)
    check_stream(tokenizer, encoded(tokenizer, prompt), data.draw(st.lists(ids, max_size=30)))


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece with bytes", "bytes as llama's", "bytes as qwen's"])
def test_half_a_character_is_never_certain(tokenizers, kind):
    tokenizer = tokenizers[kind]
    tokens = tokenizer.encode("a\U0001f9ff\U0001f9ffa")
    stream, shown = TextStream(tokenizer, tokenizer.encode("a")), []
    for token in tokens:
        stream.push(token)
        shown.append(stream.certain)
    assert len(tokens) >= 8 and not any(UNFINISHED in text for text in shown)
    assert {text.strip().removeprefix("a") for text in shown} == {
        "",
        "\U0001f9ff",
        "\U0001f9ff" * 2,
        "\U0001f9ff" * 2 + "a",
    }


def test_an_unfinished_character_is_shown_at_the_end(tokenizers):
    tokenizer = tokenizers["bpe"]
    stream = TextStream(tokenizer)
    for token in tokenizer.encode("a\U0001f9ff")[:-1]:
        stream.push(token)
    assert stream.certain == "a"
    stream.end()
    stream.end()
    assert stream.certain == stream.text == "a\ufffd"


def test_the_space_before_a_word_is_kept_after_a_prompt(tokenizers):
    words = {
        "sentencepiece": "is",
        "sentencepiece with bytes": "the",
        "words as gpt1's": "the",
        "bytes as llama's": "a",
    }
    for kind, word in words.items():
        tokenizer = tokenizers[kind]
        prompt, tokens = tokenizer.encode(word), tokenizer.encode(f"{word} {word} {word}")
        assert tokens[: len(prompt)] == prompt
        stream = TextStream(tokenizer, prompt)
        for token in tokens[len(prompt) :]:
            stream.push(token)
        assert stream.certain == f" {word} {word}"


# ---- ends


@FUZZ
@given(prompt=TEXT, text=TEXT, data=st.data())
def test_text_ends_before_the_stop_text(tokenizer, prompt, text, data):
    prompt, tokens = encoded(tokenizer, prompt), encoded(tokenizer, text)
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode([*prompt, *tokens])[len(before) :]
    start = data.draw(st.integers(0, max(len(whole) - 1, 0)))
    stop = data.draw(st.sampled_from([whole[start : start + n] for n in (1, 2, 3, 5)]) | st.text("ab\n🙂", max_size=3))
    if not stop or UNFINISHED in stop:
        return
    expected = whole.split(stop)[0]
    stream, used = TextStream(tokenizer, prompt, stop), 0
    while used < len(tokens) and not stream.ended:
        stream.push(tokens[used])
        used += 1
        assert expected.startswith(stream.certain)
        possible = tokenizer.decode([*prompt, *tokens[:used]])[len(before) :].rstrip(UNFINISHED)
        if not stream.ended:  # everything that can be shown is shown
            assert len(stream.certain) > len(possible) - len(stop)
    assert stream.ended == stream.complete == (stop in tokenizer.decode([*prompt, *tokens[:used]])[len(before) :])
    assert stream.ended == (stop in whole)
    stream.end()
    assert stream.text == stream.certain == expected


def characters(text, stop, prompt=""):
    """The certain text after each character, and the stream."""
    tokenizer = CharTokenizer.from_text(text + prompt + "?")
    stream, shown = TextStream(tokenizer, tokenizer.encode(prompt), stop), []
    for token in tokenizer.encode(text):
        stream.push(token)
        shown.append(stream.certain)
        if stream.ended:
            break
    return shown, stream


def test_the_beginning_of_a_stop_text_is_held_back():
    shown, stream = characters("xaaaby", "aab")
    assert shown == ["x", "x", "x", "xa", "xa"] and stream.ended and stream.text == "xa"
    shown, stream = characters("aaca", "aab")
    assert shown == ["", "", "aac", "aac"] and not stream.ended and not stream.complete
    stream.end()
    assert stream.certain == "aaca" and stream.complete and not stream.ended
    shown, stream = characters("bb", "ab", prompt="a")  # the prompt doesn't count
    assert shown == ["b", "bb"] and not stream.ended


@FUZZ
@given(text=st.text("abc", max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_first_of_several_stop_texts_ends_a_text(text, stops):
    ends = [end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    expected = text[: min(text.index(stop) for stop in stops if stop in text[: ends[0]])] if ends else text
    shown, stream = characters(text, stops)
    assert stream.ended == bool(ends) and all(expected.startswith(part) for part in shown)
    stream.end()
    assert stream.certain == expected


def test_a_stop_text_within_a_token_or_across_tokens():
    tokenizer = BPETokenizer.train(["abcabcabcabc" * 9], 300)
    token = tokenizer.encode("abcabc")
    assert len(token) == 1
    for stop, expected in (("c", "ab"), ("ca", "ab"), ("cabcabca", "ab"), ("abc", ""), ("bcabcab", "a")):
        stream = TextStream(tokenizer, [], stop)
        while not stream.ended:
            stream.push(token[0])
            assert expected.startswith(stream.certain)
        assert stream.text == stream.certain == expected


def test_an_unfinished_character_may_complete_a_stop_text(tokenizers):
    tokenizer = tokenizers["bpe"]
    stream = TextStream(tokenizer, [], "\ufffd")
    for token in tokenizer.encode("a\U0001f9ff")[:-1]:
        stream.push(token)
    stream.end()
    assert stream.text == "a" and stream.ended


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_end_of_text_ends_a_text_and_is_not_part_of_it(tokenizers, kind):
    tokenizer = tokenizers[kind]
    stream = TextStream(tokenizer, [tokenizer.start_token], stop="1x")
    for token in [*tokenizer.encode("29 times 11"), tokenizer.end_of_text]:
        assert not stream.ended
        stream.push(token)
    assert stream.ended and stream.complete and stream.text == stream.certain == "29 times 11"


# ---- the screen

LETTERS = CharTokenizer("abcdefgh")


def continuations(*prompts, stop=None):
    return [Continuation(prompt, LETTERS.encode(prompt), LETTERS, stop) for prompt in prompts]


def steps(text_of):
    """Steps that give row i the letters of its text until it ends."""
    for i in range(max(map(len, text_of))):
        rows = [row for row, text in enumerate(text_of) if len(text) > i]
        yield rows, LETTERS.encode("".join(text_of[row][i] for row in rows)), [-0.5 - i] * len(rows)


def test_several_continuations_are_shown_in_order_as_they_grow(capsys):
    batch, shown = continuations("a", "b", "c"), []

    def recorded():
        for step in steps(["abcd", "g", "hh"]):
            shown.append(capsys.readouterr().out)
            yield step

    Screen(batch, as_json=False).follow(batch, recorded())
    line = "\n" + "-" * 15 + "\n"
    assert shown == ["a", "a", "b", "c"]
    assert capsys.readouterr().out == f"d{line}bg{line}chh\n"


def test_the_next_continuation_is_shown_as_soon_as_one_ends(capsys):
    batch = continuations("a", "b", stop="h")
    screen, shown = Screen(batch, as_json=False), []

    def recorded():
        for step in steps(["abh", "cdefg"]):
            yield step
            shown.append(capsys.readouterr().out)

    screen.follow(batch, recorded())
    assert shown == ["aa", "b", "\n" + "-" * 15 + "\nbcde", "f", "g"]
    assert capsys.readouterr().out == "\n"


def test_batches_follow_one_another(capsys):
    batch_1, batch_2 = continuations("a"), continuations("b", "c")
    screen = Screen([*batch_1, *batch_2], as_json=False)
    screen.follow(batch_1, steps(["b"]))
    screen.follow(batch_2, steps(["c", "d"]))
    line = "\n" + "-" * 15 + "\n"
    assert capsys.readouterr().out == f"ab{line}bc{line}cd\n"


def test_json_is_one_valid_line_per_continuation(capsys):
    batch = continuations("a", "", "c", stop="gh")
    Screen(batch, as_json=True).follow(batch, steps(["bcd", "aghb"[:3], "f"]))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["text"], line["ended"]) for line in lines] == [
        ("a", "bcd", False), ("", "a", True), ("c", "f", False),
    ]  # fmt: skip
    assert lines[0]["tokens"] == [1, 2, 3] and lines[0]["log_probabilities"] == [-0.5, -1.5, -2.5]
    assert lines[1]["tokens"] == [0, 6, 7]
    assert 0 <= lines[0]["first_token_seconds"] <= lines[0]["seconds"] and lines[0]["tokens_per_second"] > 0
    assert lines[2]["tokens_per_second"] == 1 / lines[2]["seconds"]


def test_a_continuation_without_tokens_is_shown(capsys):
    for as_json in (False, True):
        batch = continuations("ab")
        Screen(batch, as_json).follow(batch, [])
    text, line, _ = capsys.readouterr().out.split("\n")
    result = json.loads(line)
    assert text == "ab" and result["text"] == "" and result["tokens"] == [] and result["seconds"] is None


def test_json_of_any_text_is_one_line(capsys):
    tokenizer = CharTokenizer("\n\u2028🙂\"\\'")
    batch = [Continuation("\n", [0], tokenizer, None)]
    tokens = list(range(tokenizer.vocab_size))
    Screen(batch, as_json=True).follow(batch, [([0], [token], [0.0]) for token in tokens])
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and json.loads(output)["text"] == tokenizer.decode(tokens)


def test_nothing_is_added_after_a_stop(capsys):
    batch = continuations("a", "b", stop="g")
    Screen(batch, as_json=False).follow(batch, steps(["bcd", "agh"]))
    assert batch[1].text == "a" and batch[1].tokens == [0, 6]
    assert capsys.readouterr().out == f"abcd{chr(10)}{'-' * 15}{chr(10)}ba{chr(10)}"
