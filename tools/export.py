"""Export a model to another library's format.

    python tools/export.py out/gpt2 exported --to hf                      transformers, vLLM, llama.cpp's converter
    python tools/export.py out/gpt2 exported --to hf --dtype bfloat16     in half the space
    python tools/export.py out/finetune exported --to hf                  a model from stages/finetune.py, with its head
    python tools/export.py out/ppo exported --to hf                       a chat model, with its template
    python tools/export.py out/reward exported --to hf                    a reward model
    python tools/export.py out/gpt2 gpt2.gguf --to gguf --dtype float16   llama.cpp, Ollama, LM Studio
    python tools/export.py out/gpt2 gpt2.onnx --to onnx                   onnxruntime: tokens (B, T) to logits (B, T, V)

MODEL is a run folder, a model directory, or the name of a published model, as in sample.py. Load the export with
transformers.AutoModelForCausalLM.from_pretrained("exported"), a bidirectional one with AutoModelForMaskedLM or, with
next_sentence, AutoModelForPreTraining, a fine-tuned or reward model with AutoModelForSequenceClassification, a
multiple-choice model with GPT2DoubleHeadsModel or OpenAIGPTDoubleHeadsModel. A model that the other library can't
compute is refused.

GGUF files hold language models of GPT-2's, Qwen3's, Llama's and Mixtral's shape with a tokenizer by characters or a
byte-level BPE, and are equal to what llama.cpp's converter makes of the folder.

--verify loads the folder with transformers and prints the largest difference of logits over a few sequences, and how
many of a few texts get other token ids. The exit code is 1 if any does, or if the difference is above 1e-4, or above
1e-4 of the largest logit if that is above 1.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from gpt_arc.data.declared import CHAT_FILE, GENERATION_FILE, ID_KEYS, SETTINGS_FILE, SPECIAL_FILE, TEMPLATE_FILE
from gpt_arc.data.tokenizer import FILE_NAME, SENTENCEPIECE_FILE, Tokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.extras import import_extra
from gpt_arc.files import command, new_directory, write_file
from gpt_arc.finetuning.examples import SpecialTokens
from gpt_arc.flags import parse_flags
from gpt_arc.manifest import MANIFEST, record_files
from gpt_arc.settings import STRICT, Positional
from gpt_arc.tables import human

if TYPE_CHECKING:
    import torch

    from gpt_arc.chat.format import ChatFormat, Turn
    from gpt_arc.weights.verification import Reference
    from model import GPT

MARK = "Written by gpt-arc's tools/export.py"  # README.md starts with it: a folder without it is never replaced
NAMES = {"README.md", "config.json", GENERATION_FILE, "model.safetensors", FILE_NAME, SETTINGS_FILE, TEMPLATE_FILE}
NAMES |= {
    SENTENCEPIECE_FILE,
    CHAT_FILE,
    MANIFEST,
    "model.safetensors.index.json",
}  # nor is a folder with any other file
PAD = "<|pad|>"
SPECIAL_NAMES = ("_start_", "_delimiter_", "_classify_")  # in openai/finetune-transformer-lm
LAYOUTS = {
    "classification": "[start] text [extract]",
    "entailment": "[start] premise [delimiter] hypothesis [extract]",
    "multiple_choice": "[start] context [delimiter] option [extract] of each option (mc_token_ids: where [extract] is)",
}
REWARD_USAGE = """
    tokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("FOLDER")
    batch = tokenizer.apply_chat_template(conversations, padding=True, return_dict=True, return_tensors="pt")
    scores = model(**batch).logits[:, 0]
"""


@dataclass(frozen=True, config=STRICT)
class Options:
    model: Positional[str]
    """A run folder, whose best checkpoint is used, a model directory, or a published model: gpt2, hf:OWNER/NAME."""
    output: Positional[Path]
    """The folder to write, or the file."""
    to: Literal["hf", "gguf", "onnx"] = "hf"
    """hf: a folder in the format of Hugging Face's transformers. gguf: a file for llama.cpp and what is built on it.
    onnx: a file with the graph of ONNX, from tokens to logits, in float32."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    drop_bias: bool = False
    """Leave out the bias of a head for scores or numbers where transformers has none: moves them by a constant."""
    overwrite: bool = False
    """Replace the folder if it contains an older export, or the file."""
    verify: bool = False
    """Compare logits and token ids with those of transformers, which must be installed; exit code 1 if they differ."""

    def check(self) -> None:
        """Raises UserError for an output that holds something else, and for settings of another format."""
        if self.to == "hf":
            return check_output(self.output, self.overwrite)
        if self.verify:
            raise UserError(f"--verify compares with transformers, so it goes with --to hf, not {self.to}")
        if self.to == "onnx" and self.dtype != "float32":
            raise UserError(f"--to onnx writes float32 alone, not {self.dtype}")
        if self.output.is_dir() or self.output.suffix != f".{self.to}":
            raise UserError(f"{self.output} is not the name of a .{self.to} file: let it end in .{self.to}")
        if self.output.exists() and not self.overwrite:
            raise UserError(f"{self.output} exists: name another file, or add --overwrite=True")


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises UserError if `folder` isn't empty, unless it holds an export that may be replaced."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    readme = folder / "README.md"
    if not readme.is_file() or not readme.read_text("utf-8", errors="replace").startswith(MARK):
        raise UserError(f"{folder} holds something other than an export: name another folder")
    parts = {path.name for path in folder.glob("model-*-of-*.safetensors")}
    others = sorted(path.name for path in folder.iterdir() if path.name not in NAMES | parts)
    if others:
        raise UserError(f"{folder} holds more than an export, such as {others[0]}: name another folder")
    if not overwrite:
        raise UserError(f"{folder} holds an export already: name another folder, or add --overwrite=True")


def special_ids(tokenizer: Tokenizer, declared: dict, chat_end: int | None) -> dict[str, int | list[int] | None]:
    """The ids in config.json: those `declared` by a generation_config.json, else the tokenizer's.

    The token that ends a chat's response comes first among several ends.
    """
    main = tokenizer.end_of_text if chat_end is None else chat_end
    ends = sorted(tokenizer.ends, key=lambda id: (id != main, id))
    ids = {
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    }
    if declared:
        keys = ids.keys() if chat_end is None else ids.keys() - {"eos_token_id"}
        return ids | {key: declared.get(key) for key in keys}
    start = tokenizer.start_token if ends and not tokenizer.declared.files else tokenizer.declared.start
    return ids | {"bos_token_id": start, "pad_token_id": tokenizer.declared.pad}


def generation_config(config: dict, declared: dict) -> dict:
    """The default generation settings: those `declared`, else as transformers derives them from config.json."""
    tokens = {key: config[key] for key in ID_KEYS if config[key] is not None}
    version = {"transformers_version": config["transformers_version"]}
    if declared:
        return declared | tokens | version
    cache = {"use_cache": config["use_cache"]} if "use_cache" in config else {}
    outputs = {"output_attentions": False, "output_hidden_states": False}
    return {"_from_model_config": True, **tokens, **outputs, **version, **cache}


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, bytes]:
    """The tokenizer's files, with settings that make transformers' AutoTokenizer read them unchanged."""
    files = dict(tokenizer.files())
    special = json.loads(files.pop(SPECIAL_FILE, b"{}"))
    special = {key: value["content"] if "content" in value else value for key, value in special.items()}
    if FILE_NAME not in files:
        return files
    if SETTINGS_FILE in files:
        settings = json.loads(files[SETTINGS_FILE])
        if special and "added_tokens_decoder" not in settings:
            files[SETTINGS_FILE] = as_json(settings | special)
        return files
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    settings["clean_up_tokenization_spaces"] = False  # otherwise decode removes spaces
    end, declared = tokenizer.end_of_text, tokenizer.declared
    tokens = {"bos_token": declared.start if declared.files else end, "eos_token": end, "pad_token": declared.pad}
    settings |= {key: tokenizer.decode([id]) for key, id in tokens.items() if id is not None}
    return files | {SETTINGS_FILE: as_json(settings | special)}


def with_special_tokens(
    files: dict[str, bytes], named: dict[str, int], more: dict, layout: str | None = None, lstrip: bool = False
) -> dict[str, bytes] | None:
    """Returns the tokenizer's files with more special tokens and settings; None if the tokens can't get those ids.

    `layout`: post-processor that adds tokens to each text, in JSON, instead of the tokenizer's. `lstrip`: a space
    before the tokens belongs to them.
    """
    from tokenizers import Tokenizer as Library

    if FILE_NAME not in files:
        return None
    table, known = json.loads(files[FILE_NAME]), Library.from_buffer(files[FILE_NAME]).get_vocab()
    flags = {"single_word": False, "lstrip": lstrip, "rstrip": False, "normalized": False, "special": True}
    new = [{"id": id, "content": name, **flags} for name, id in named.items()]
    table["added_tokens"] = [*(table.get("added_tokens") or ()), *new]
    if isinstance(table["model"]["vocab"], dict):  # ids in it may have gaps, as when the model has extra rows
        table["model"]["vocab"] |= {token["content"]: token["id"] for token in table["added_tokens"]}
    if layout is not None:
        table["post_processor"] = json.loads(layout)
    content = json.dumps(table, ensure_ascii=False, indent=1).encode()
    if named.keys() & known.keys() or Library.from_buffer(content).get_vocab() != known | named:
        return None
    return files | {FILE_NAME: content, SETTINGS_FILE: as_json(json.loads(files[SETTINGS_FILE]) | more)}


def bert_files(files: dict[str, bytes], tokenizer: Tokenizer, next_sentence: bool) -> dict[str, bytes] | None:
    """Returns the tokenizer's files with those of a BERT's tokens that it lacks; None if it can't have them.

    With `next_sentence` they are laid out around a text and around a pair.
    """
    from tokenizers.processors import TemplateProcessing

    from gpt_arc.data.masking import MASK, mask_token, sentence_marks

    marks = sentence_marks(tokenizer, next_sentence) or ()
    ids = {MASK: mask_token(tokenizer), **dict(zip(("[CLS]", "[SEP]"), marks))}
    keys = {MASK: "mask_token", "[CLS]": "cls_token", "[SEP]": "sep_token"}
    named = {name: id for name, id in ids.items() if id >= tokenizer.vocab_size}
    layout = None
    more: dict[str, Any] = {keys[name]: name for name in named}
    if "[CLS]" in named:
        pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        around = [(name, id) for name, id in named.items() if name != MASK]
        layout = TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=around).__getstate__()
        more["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return with_special_tokens(files, named, more, layout, lstrip=tokenizer.joins_space) if named else files


def classifier_files(
    files: dict[str, bytes], task: str, special: SpecialTokens, max_tokens: int
) -> dict[str, bytes] | None:
    """Returns the tokenizer's files changed to lay out a classifier's input; None if it can't have the tokens."""
    from tokenizers.processors import TemplateProcessing

    if FILE_NAME not in files:
        return None
    start, delimiter, extract = SPECIAL_NAMES
    named: dict[str, int] = dict(zip(SPECIAL_NAMES, special))
    # transformers takes an empty second text for none
    single = f"{start} $A {extract}" if task == "classification" else f"{start} $A {delimiter} {extract}"
    pair = f"{start} $A {delimiter} $B {extract}"
    layout = TemplateProcessing(single=single, pair=pair, special_tokens=[*named.items()])
    settings = json.loads(files[SETTINGS_FILE])
    for key in ("add_bos_token", "add_eos_token"):  # transformers would replace the layout by these
        settings.pop(key, None)
    more = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # others may have a layout of their own
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would embed token_type_ids
        "model_max_length": max_tokens,
        "pad_token": start,  # as in config.json
        "padding_side": "right",
        "split_special_tokens": True,  # a special token spelled out in a text is text
    }
    return with_special_tokens(files | {SETTINGS_FILE: as_json(settings)}, named, more, layout.__getstate__())


def usage(task: str, special: SpecialTokens, max_tokens: int, named: bool) -> str:
    """README.md's text on a classifier's input; `named`: the tokenizer adds the special tokens."""
    text = f"\nIts input is {LAYOUTS[task]} with the ids {describe_ids(special)}; at most {max_tokens} tokens in all, "
    text += "shorter inputs padded at the end by [start].\n"
    if not named:
        return text + "The tokenizer doesn't know these tokens: put their ids around those of a text.\n"
    text += "AutoTokenizer adds them, and lays out a text and its pair. Called with truncation=True, it cuts what is "
    text += "too long; of two long texts it may keep one token less of the first and one more of the second than "
    text += "gpt-arc does.\n"
    if task == "multiple_choice":
        return text
    example = '"a text"' if task == "classification" else '{"text": "a premise", "text_pair": "a hypothesis"}'
    return f"""{text}
    classify = transformers.pipeline("text-classification", "FOLDER", truncation=True)
    classify([{example}])
"""


def describe_ids(special: SpecialTokens) -> str:
    return ", ".join(f"[{name}] = {id}" for name, id in special._asdict().items())


def as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


@dataclasses.dataclass
class Export:
    """A model in transformers' format."""

    config: dict[str, Any]  # config.json
    tensors: dict[str, "torch.Tensor"]
    files: dict[str, bytes]  # the others, except README.md
    reference: "Reference"
    tokenizer: Tokenizer | None
    chat: "ChatFormat | None" = None
    about: str = ""  # more of README.md
    note: str = ""  # for the user

    @property
    def form(self) -> str:
        """The class; for a language model the architecture."""
        return self.config["model_type"] if GENERATION_FILE in self.files else self.config["architectures"][0]


def basis(
    model: "GPT", tokenizer: Tokenizer | None, chat_end: int | None, dtype: str
) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Any]]:
    """Returns config.json, the tokenizer's files, and the generation settings that were declared with them."""
    from gpt_arc.weights.huggingface import hf_config

    config = hf_config(model.config, dtype)
    files = {} if tokenizer is None else tokenizer_files(tokenizer, model.config.block_size)
    declared = json.loads(files.pop(GENERATION_FILE, b"{}"))
    if tokenizer is not None:
        config |= special_ids(tokenizer, declared, chat_end)
    return config, files, declared


def conversation(text: str) -> list["Turn"]:
    """Returns a conversation to compare encodings: `text`, and itself as the response."""
    from gpt_arc.chat.format import Turn

    return [Turn("user", text), Turn("assistant", text)]


def add_chat(export: Export, chat: "ChatFormat", added: dict[str, int], template: str, more: dict[str, Any]) -> None:
    """Adds a chat format to an export: the tokens `added`, a template in Jinja and `more` settings."""
    mark = next(mark for mark, id in chat.ids.items() if id == chat.end)
    export.chat = chat
    export.files.pop(TEMPLATE_FILE, None)  # of the model that it was trained from
    extended = with_special_tokens(export.files, added, {"chat_template": template, "eos_token": mark, **more})
    if extended is None:
        export.note = f"AutoTokenizer doesn't know the ids of the chat's marks: {added}"
        export.reference.encode = None
    else:
        export.reference.encode_theirs = lambda theirs, text: theirs.apply_chat_template(
            [turn._asdict() for turn in conversation(text)], return_dict=True
        )["input_ids"]
    export.files = extended or export.files


def both_logits(model: "GPT", tokens: "torch.Tensor") -> "torch.Tensor":
    """Returns all logits of rows of tokens: of hidden tokens, then of the next sentence, (B, T V + 2)."""
    import torch

    hidden = model.hidden(tokens)
    return torch.cat((model.logits(hidden).flatten(1), model.pair_head(hidden)), dim=1)


def from_language_model(options: Options, dtype: "torch.dtype") -> Export:
    from gpt_arc.chat.format import load_with_chat
    from gpt_arc.weights.directory import refuse_images
    from gpt_arc.weights.huggingface import hf_tensors
    from gpt_arc.weights.verification import Reference

    refuse_images(options.model, f"export all with: {command('tools/llava.py', options.model, 'FOLDER')}")
    model, tokenizer, chat = load_with_chat(options.model)
    if model.config.encoder_layers:
        use = command("sample.py", options.model, "--start=SOURCE")
        raise UserError(
            f"{options.model} turns sources into targets, and transformers has no counterpart here for such a model: "
            f"use it with: {use}"
        )
    config, files, declared = basis(model, tokenizer, chat.end if chat else None, options.dtype)
    if model.config.attention == "causal":
        files[GENERATION_FILE] = as_json(generation_config(config, declared))
    elif tokenizer:
        files = bert_files(files, tokenizer, model.config.next_sentence) or files
    reference = Reference(model, lambda tokens, _: model(tokens))
    if model.config.next_sentence:
        reference.outputs = lambda tokens, _: both_logits(model, tokens)
    if tokenizer and FILE_NAME in files:
        reference.encode = tokenizer.encode
        reference.encode_theirs = lambda theirs, text: theirs(text, add_special_tokens=False).input_ids
    export = Export(config, dict(hf_tensors(model, dtype)), files, reference, tokenizer)
    if chat:
        reference.encode = lambda text: chat.encode(conversation(text))[0]
        add_chat(export, chat, chat.added, chat.jinja, {})
    elif tokenizer is None:
        export.note = "it has no tokenizer, because the model has none"
    return export


def from_classifier(options: Options, dtype: "torch.dtype") -> Export:
    from gpt_arc.finetuning.classifier import load_classifier, make_batch
    from gpt_arc.finetuning.examples import Example, sequences_of
    from gpt_arc.weights.edit import fold_shift
    from gpt_arc.weights.huggingface import hf_classifier_config, hf_classifier_tensors
    from gpt_arc.weights.verification import Reference

    model, tokenizer = load_classifier(options.model)
    trained, special = model.config, model.config.special
    if trained.lstm:
        raise UserError("the model is an LSTM, and transformers has no architecture for it")
    config, files, _ = basis(model.trunk, tokenizer, None, options.dtype)
    # only an input's first token is [start]
    config = hf_classifier_config(config, trained.task, trained.classes, special.start, trained.dropout)
    extended = classifier_files(files, trained.task, special, trained.max_tokens)
    about = usage(trained.task, special, trained.max_tokens, named=extended is not None)
    if trained.is_regression:
        model.head.weight.data *= trained.scale
        shift = fold_shift(model.trunk, model.head.weight, trained.mean)
        about += dropped(shift, options, config, "values")
        model.config = dataclasses.replace(trained, mean=0.0, scale=1.0)
    tensors = dict(hf_classifier_tensors(model.trunk, model.head.weight, trained.task, dtype))
    note = f"AutoTokenizer doesn't know {describe_ids(special)}: put these ids around those of a text"

    def outputs(tokens: "torch.Tensor", lengths: "torch.Tensor") -> "torch.Tensor":
        rows = [[row[:length]] for row, length in zip(tokens.tolist(), lengths)]
        return model(*make_batch(rows, [0.0 if trained.is_regression else 0] * len(rows))).logits

    reference, count = Reference(model, outputs, special.extract), 1 if trained.task == "classification" else 2
    if extended:
        reference.encode = lambda text: sequences_of(
            Example((text,) * count, None, text), trained.task, tokenizer, special, trained.max_tokens
        )[0][0]
        reference.encode_theirs = lambda theirs, text: theirs(*(text,) * count, truncation=True).input_ids
    return Export(config, tensors, extended or files, reference, tokenizer, None, about, "" if extended else note)


def dropped(bias: float, options: Options, config: dict[str, Any], outputs: str) -> str:
    """Returns README.md's text on the bias of a head that is left out, if any. Raises UserError unless it may be."""
    if bias and not options.drop_bias:
        raise UserError(
            f"the head of {options.model} has a bias of {bias:.4g}, which {config['architectures'][0]} has no place "
            f"for: --drop_bias leaves it out, which moves all {outputs} by that constant"
        )
    return f"\nAdd {bias:.9g} for the {outputs} that gpt-arc gives.\n" if bias else ""


def from_reward_model(options: Options, dtype: "torch.dtype") -> Export:
    from torch.nn.init import zeros_

    from gpt_arc.alignment.reward_model import fold_bias, load_reward_model
    from gpt_arc.weights.edit import with_more_tokens
    from gpt_arc.weights.huggingface import hf_classifier_config, hf_classifier_tensors
    from gpt_arc.weights.verification import Reference

    model, tokenizer, chat = load_reward_model(options.model)
    known = (tokenizer.declared.pad, tokenizer.end_of_text)
    pad, added = next((id for id in known if id not in (None, chat.end)), None), chat.added
    if pad is None:  # the padding must differ from the token at the end, where the score is read
        pad = model.trunk.config.vocab_size
        model.trunk, added = with_more_tokens(model.trunk, 1), added | {PAD: pad}
        zeros_(model.trunk.token_embedding.weight[pad])
    config, files, _ = basis(model.trunk, tokenizer, chat.end, options.dtype)
    config = hf_classifier_config(config, "reward", None, pad)
    fold_bias(model)
    tensors = dict(hf_classifier_tensors(model.trunk, model.head.weight, "reward", dtype))
    about = f"\nIts output is the score of a conversation that ends with a response.\n{REWARD_USAGE}"
    about += dropped(model.head.bias.item(), options, config, "scores")
    zeros_(model.head.bias)
    reference = Reference(
        model, model, chat.end, lambda text: chat.prompt(conversation(text)[:1]) + chat.response(text)
    )
    export = Export(config, tensors, files, reference, tokenizer, about=about)
    name = PAD if PAD in added else tokenizer.decode([pad])
    add_chat(export, chat, added, chat.scored_jinja, {"pad_token": name, "padding_side": "right"})
    return export


def write(export: Export, options: Options) -> None:
    from gpt_arc.weights.tensor_files import write_weights

    readme = f"{MARK} from {options.model}, as {export.form} of transformers.\n{export.about}"
    with new_directory(options.output.resolve()) as temporary:
        write_weights(temporary, export.tensors)
        for name, content in {**export.files, "config.json": as_json(export.config), "README.md": readme}.items():
            write_file(temporary / name, content)
        if export.chat:
            export.chat.save(temporary)
        record_files(temporary, *sorted(path.name for path in temporary.iterdir()))


def verified(export: Export, folder: Path) -> bool:
    """Prints how the export in `folder` differs from our model in transformers; returns whether within the bounds."""
    from gpt_arc.weights.verification import difference, differing_texts

    block_size = next(export.config[key] for key in ("n_positions", "max_position_embeddings") if key in export.config)
    largest, bound = difference(export.reference, folder, export.config, block_size)
    print(f"verified: the largest difference of logits is {largest:.2g}, the bound {bound:.2g}")
    if export.tokenizer is None or export.reference.encode is None:
        print("token ids are not compared")
        return largest <= bound
    differing, compared = differing_texts(export.reference, folder, export.tokenizer)
    example = f", such as {differing[0][:60]!r}" if differing else ""
    print(f"verified: the token ids of {len(differing)} of {compared} texts differ{example}")
    return largest <= bound and not differing


def to_gguf(options: Options) -> int:
    """Writes a GGUF file; returns the number of parameters."""
    from torch import float32

    from gpt_arc.weights.gguf_file import write_gguf
    from gpt_arc.weights.tensor_files import check_range

    export = from_language_model(options, float32)  # GGUFWriter rounds, except norms and routers
    check_range(export.tensors, options.model, options.dtype)
    name = Path(options.model).name
    write_gguf(options.output, name, export.config, export.tensors, export.tokenizer, export.files, options.dtype)
    return sum(tensor.numel() for tensor in export.tensors.values())


def to_onnx(options: Options) -> int:
    """Writes an ONNX file; returns the number of parameters."""
    from gpt_arc.weights.directory import load_model, refuse_images
    from gpt_arc.weights.onnx_file import write_onnx

    refuse_images(options.model, f"export all with: {command('tools/llava.py', options.model, 'FOLDER')}")
    model, _ = load_model(options.model)
    write_onnx(options.output, model)
    return model.num_parameters()


def main() -> int:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    options.check()
    if options.verify:
        logging = import_extra("transformers").utils.logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    import torch  # slow: import once the settings are valid

    from gpt_arc.alignment.reward_model import is_reward_model
    from gpt_arc.finetuning.classifier import is_classifier
    from gpt_arc.weights.tensor_files import check_range

    convert = from_language_model
    if is_classifier(options.model) or is_reward_model(options.model):
        convert = from_classifier if is_classifier(options.model) else from_reward_model
        if options.to != "hf":
            raise UserError(f"--to {options.to} takes language models alone, and {options.model} has another head")
    if options.to != "hf":
        parameters = (to_gguf if options.to == "gguf" else to_onnx)(options)
        size = human(options.output.stat().st_size, "B")
        print(f"{options.output}: {parameters:,} parameters in {options.dtype}, {size}")
        return 0
    export = convert(options, getattr(torch, options.dtype))
    check_range(export.tensors, options.model, options.dtype)
    write(export, options)
    parameters = sum(tensor.numel() for tensor in export.tensors.values())
    print(f"{options.output}: {export.form}, {parameters:,} parameters in {options.dtype}")
    if export.note:
        print(export.note)
    if SENTENCEPIECE_FILE in export.files:
        print(f"AutoTokenizer may read {SENTENCEPIECE_FILE} otherwise than SentencePiece: encode with that library")
    return 0 if not options.verify or verified(export, options.output) else 1


if __name__ == "__main__":
    entry_point(main)()
