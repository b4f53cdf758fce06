"""What a model directory declares about texts, against transformers' AutoTokenizer and generate."""

import json

import pytest
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gpt_arc.data import prepare
from gpt_arc.data.documents import Files, find_files
from gpt_arc.data.text_stream import TextStream
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.data.tokenizer import load_tokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.weights.directory import load_text_model, save_model
from tools import export

CORPUS = ["The cat sat on the mat, didn't it?", "naïve dogs bark at 1234 漢字 🙂\n\n"] * 8
TEXTS = [CORPUS[0], "  two spaces\n", "naïve 漢字 🙂", "x"]
SIZE = 320
QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*special, pattern=None, normalizer=None):
    """A byte-level BPE with special tokens at the end of its vocabulary."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if normalizer:
        library.normalizer = normalizer
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    library.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return library


def metaspace(scheme):
    """A BPE of words with a leading ▁ and a token for each byte, as Llama 2's."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False)
    library.train_from_iterator([CORPUS[0]] * 8, trainer)
    table = json.loads(library.to_str())
    table["added_tokens"] = table["added_tokens"][:3]  # bytes are ordinary tokens
    return tokenizers.Tokenizer.from_str(json.dumps(table))


def starting(library, start):
    """The tokenizer with a start token that its post-processor adds."""
    special = [(start, library.token_to_id(start))]
    library.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=special)
    return library


def vocab_and_merges(library, *special, **changes):
    """The files vocab.json and merges.txt."""
    model = json.loads(library.to_str())["model"]
    vocab = model["vocab"] | {text: len(model["vocab"]) + i for i, text in enumerate(special)}
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    return {"vocab.json": vocab, "merges.txt": "#version: 0.2\n" + merges}


def gpt1():
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return vocab_and_merges(library)


def shape(kind, files, ids=None, generation=None, **settings):
    """A directory: the model's type, the tokenizer's files, ids in config.json and generation_config.json."""
    if isinstance(files, tokenizers.Tokenizer):
        files = {"tokenizer.json": json.loads(files.to_str())}
    if settings:
        files |= {"tokenizer_config.json": settings}
    if generation:
        files |= {"generation_config.json": generation}
    return kind, files, ids or {}


def shapes():
    gpt2 = byte_level("<|endoftext|>")
    chatml = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    llama3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    last = {"eos_token_id": 302, "bos_token_id": 300, "pad_token_id": 300}
    return {
        "qwen": shape(
            "qwen3", byte_level(*chatml, pattern=QWEN, normalizer=normalizers.NFC()), {"eos_token_id": 302},
            {"eos_token_id": [302, 300], "bos_token_id": 300, "pad_token_id": 300, "top_p": 0.8},
            eos_token="<|im_end|>", bos_token=None, pad_token="<|endoftext|>", chat_template="{{ messages }}",
        ),
        "im_end without generation_config": shape(
            "qwen3", byte_level(*chatml), last,
            eos_token={"__type": "AddedToken", "content": "<|im_end|>"}, pad_token="<|endoftext|>"
        ),
        "llama 2": shape(
            "mixtral", starting(metaspace("first"), "<s>"), {"eos_token_id": 2, "bos_token_id": 1},
            eos_token="</s>", bos_token="<s>", unk_token="<unk>", add_bos_token=True,
        ),
        "llama 3": shape(
            "mixtral", starting(byte_level(*llama3, pattern=QWEN), "<|begin_of_text|>"), {"eos_token_id": 301},
            {"eos_token_id": [301, 302, 303], "bos_token_id": 300}, bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
        ),
        "mixtral, always ▁": shape(
            "mixtral", starting(metaspace("always"), "<s>"), {"eos_token_id": 2, "bos_token_id": 1},
            bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ),
        "neox": shape(
            "gpt2", byte_level("<|endoftext|>", "<|padding|>"), {"eos_token_id": 300, "bos_token_id": 300},
            eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|padding|>",
        ),
        "gpt-1": shape("openai-gpt", gpt1()),
        "gpt-2": shape(
            "gpt2", vocab_and_merges(gpt2, "<|endoftext|>"), {"eos_token_id": 300, "bos_token_id": 300}
        ),
        "[PAD] beyond the model": shape(
            "gpt2", byte_level("<|endoftext|>", *(f"<|{i}|>" for i in range(19)), "[PAD]"), {"eos_token_id": 300},
            eos_token="<|endoftext|>", pad_token="[PAD]",
        ),
        "special_tokens_map.json alone": shape(
            "gpt2", {
                "tokenizer.json": json.loads(byte_level("<|endoftext|>", "</s>").to_str()),
                "special_tokens_map.json": {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "</s>"},
            }, {"eos_token_id": 301},
        ),
        "config.json alone": shape("qwen3", byte_level("</s>", "<s>"), {"eos_token_id": 300, "bos_token_id": 301}),
        "vocab.json with </s>": shape(
            "gpt2", vocab_and_merges(gpt2, "<s>", "</s>"), {"eos_token_id": 301, "bos_token_id": 300},
            eos_token="</s>", bos_token="<s>", unk_token="</s>", add_bos_token=True, tokenizer_class="GPT2Tokenizer",
        ),
        "two files that differ": shape(
            "gpt2", byte_level(*chatml), {"eos_token_id": 301}, {"eos_token_id": 302}, eos_token="<|endoftext|>"
        ),
    }  # fmt: skip


SHAPES = shapes()


@pytest.fixture(scope="module", params=SHAPES)
def directories(request, tmp_path_factory):
    """The name of a shape, its directory, our copy of it in our own format, and our export of that."""
    kind, files, ids = SHAPES[request.param]
    root = tmp_path_factory.mktemp("shape")
    size = dict(vocab_size=SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    if kind not in ("gpt2", "openai-gpt"):
        size |= dict(num_key_value_heads=1, head_dim=8, intermediate_size=16)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **size))
    theirs.save_pretrained(root / "original")
    (root / "original" / "generation_config.json").unlink()
    path = root / "original" / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_token_id")}
    for name, content in {"config.json": config | ids, **files}.items():
        (root / "original" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    save_model(*load_text_model(root / "original"), root / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tools/export.py", str(root / "copy"), str(root / "export")])
        with pytest.raises(SystemExit) as stop:
            entry_point(export.main)()
    assert not stop.value.code
    return request.param, root / "original", root / "copy", root / "export"


def test_ids_are_those_of_auto_tokenizer(directories):
    name, original, copy, exported = directories
    theirs = transformers.AutoTokenizer.from_pretrained(original)
    for folder in (original, copy, exported):
        tokenizer = load_tokenizer(folder)
        for text in TEXTS:
            expected = theirs(text, split_special_tokens=True)["input_ids"]
            assert tokenizer.encode_prompt(text) == expected, folder
            assert transformers.AutoTokenizer.from_pretrained(exported)(text)["input_ids"] == expected
    again = transformers.AutoTokenizer.from_pretrained(exported)
    if name != "config.json alone":  # transformers finds no eos_token in that directory, we take config.json's
        assert again.eos_token_id == theirs.eos_token_id
        assert tokenizer.end_of_text == theirs.eos_token_id
    assert again.chat_template == theirs.chat_template


def stops(model, ids):
    """The tokens with which transformers' generate ends: a row for each of them, filled with token 7 after its end."""
    forced = torch.tensor(ids)[:, None]

    def force(tokens, scores):
        return torch.full_like(scores, -torch.inf).scatter(1, forced, 0.0)

    prompts = torch.tensor([[5, 6]]).expand(len(ids), -1)
    output = model.generate(prompts, max_new_tokens=2, do_sample=False, logits_processor=[force], pad_token_id=7)
    assert torch.equal(output[:, 2], forced[:, 0])
    return [id for id, (_, *later) in zip(ids, output[:, 2:].tolist()) if later in ([], [7])]


def test_continuations_end_as_by_generate(directories):
    _, original, copy, exported = directories
    for reference in (original, exported):
        model = transformers.AutoModelForCausalLM.from_pretrained(reference).eval()
        special = [id for id in range(SIZE) if id < 3 or id >= 299]
        expected = stops(model, special)
        for folder in (original, copy, exported):
            tokenizer = load_tokenizer(folder)
            streams = [TextStream(tokenizer) for _ in special]
            for stream, id in zip(streams, special):
                stream.push(id)
            assert [id for id, stream in zip(special, streams) if stream.ended] == expected, (reference, folder)


def test_ids_in_the_exported_files_are_those_of_the_original(directories):
    _, original, _, exported = directories
    ours = transformers.GenerationConfig.from_pretrained(exported)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(original).generation_config
    for key in ("bos_token_id", "eos_token_id", "top_p"):
        assert getattr(ours, key) == getattr(theirs, key), key


def test_documents_end_with_the_declared_token(directories, tmp_path, monkeypatch):
    name, original, _, _ = directories
    monkeypatch.setattr(prepare, "DATA_ROOT", tmp_path)
    texts = [f"The cat sat {n}" for n in "abcdefgh"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    documents = Files(find_files([str(tmp_path / "?.txt")]), "text")
    settings = prepare.CorpusSettings(tokenizer=str(original), val_fraction=0.5, workers=1)
    if name == "gpt-1":  # it declares none
        with pytest.raises(UserError, match="has no end-of-text token"):
            prepare.prepare_documents(documents, settings, "made")
        return
    prepare.prepare_documents(documents, settings, "made")
    tokenizer = load_tokenizer(tmp_path / "made")
    files = [TokenFiles(tmp_path / "made", split) for split in ("train", "val")]
    end = transformers.AutoTokenizer.from_pretrained(original).eos_token_id
    end = 300 if name == "config.json alone" else end
    documents = [tokenizer.encode(text) + ([] if end is None else [end]) for text in texts]
    tokens = [token for file in files for token in file.read(0, len(file)).tolist()]
    assert len(tokens) == sum(map(len, documents)) and all(map(len, files))
    split = [document for document in documents if str(document)[1:-1] in str(tokens)]
    assert split == documents
    assert tokenizer.end_of_text == end and tokenizer.ends == load_tokenizer(original).ends


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": "2"}', 'eos_token_id = "2" is neither a token\'s id nor a list'),
        ("generation_config.json", "[]", "generation_config.json is damaged"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token = 3 in tokenizer_config.json or special_tokens_map"),
        ("special_tokens_map.json", "{", "special_tokens_map.json is damaged"),
    ],
)
def test_a_damaged_declaration_is_named(tmp_path, name, content, message):
    (tmp_path / "tokenizer.json").write_text(byte_level("<|endoftext|>").to_str())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_id_of_minus_one_declares_nothing(tmp_path, name):
    """As in the first Llamas."""
    library = byte_level("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    end = library.token_to_id("<|endoftext|>")
    (tmp_path / "config.json").write_text('{"bos_token_id": 7}')
    (tmp_path / name).write_text('{"eos_token_id": [-1, 5], "bos_token_id": -1, "pad_token_id": -1}')
    tokenizer = load_tokenizer(tmp_path)
    start = 7 if name == "generation_config.json" else None
    assert (tokenizer.ends, tokenizer.declared.start, tokenizer.declared.pad) == ({5}, start, None)
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").declared.start == start
    (tmp_path / name).write_text('{"eos_token_id": -1}')
    assert load_tokenizer(tmp_path).ends == {end}
