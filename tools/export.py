"""Export a model to another library's format.

    python tools/export.py out/gpt2 exported --to hf                      transformers, vLLM, llama.cpp's converter
    python tools/export.py out/gpt2 exported --to hf --dtype bfloat16     in half the space
    python tools/export.py out/finetune exported --to hf                  a model from stages/finetune.py, with its head
    python tools/export.py out/ppo exported --to hf                       a chat model, with its template

MODEL is a run folder, a model directory, or the name of a published model, as in sample.py. Load the export with
transformers.AutoModelForCausalLM.from_pretrained("exported"), a fine-tuned model with
AutoModelForSequenceClassification, a multiple-choice model with GPT2DoubleHeadsModel or OpenAIGPTDoubleHeadsModel. A
model that the other library can't compute is refused.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from gpt_arc.data.declared import CHAT_FILE, GENERATION_FILE, ID_KEYS, SETTINGS_FILE, SPECIAL_FILE, TEMPLATE_FILE
from gpt_arc.data.tokenizer import FILE_NAME, SENTENCEPIECE_FILE, Tokenizer
from gpt_arc.errors import NotFinite, UserError, entry_point
from gpt_arc.files import name_failed_writes, new_directory, replacing, write_file
from gpt_arc.finetuning.examples import SpecialTokens
from gpt_arc.flags import parse_flags
from gpt_arc.manifest import MANIFEST, record_files
from gpt_arc.settings import STRICT, Positional

if TYPE_CHECKING:
    import torch

MARK = "Written by gpt-arc's tools/export.py"  # README.md starts with it: a folder without it is never replaced
NAMES = {"README.md", "config.json", GENERATION_FILE, "model.safetensors", FILE_NAME, SETTINGS_FILE, TEMPLATE_FILE}
NAMES |= {SENTENCEPIECE_FILE, CHAT_FILE, MANIFEST}  # nor is a folder with any other file
SPECIAL_NAMES = ("_start_", "_delimiter_", "_classify_")  # in openai/finetune-transformer-lm
LAYOUTS = {
    "classification": "[start] text [extract]",
    "entailment": "[start] premise [delimiter] hypothesis [extract]",
    "multiple_choice": "[start] context [delimiter] option [extract] of each option (mc_token_ids: where [extract] is)",
}


@dataclass(frozen=True, config=STRICT)
class Options:
    model: Positional[str]
    """A run folder, whose best checkpoint is used, a model directory, or a published model: gpt2, hf:OWNER/NAME."""
    output: Positional[Path]
    """The folder to write."""
    to: Literal["hf"] = "hf"
    """hf: the format of Hugging Face's transformers."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    overwrite: bool = False
    """Replace the folder if it contains an older export."""


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises UserError if `folder` isn't empty, unless it holds an export that may be replaced."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    readme = folder / "README.md"
    if not readme.is_file() or not readme.read_text("utf-8", errors="replace").startswith(MARK):
        raise UserError(f"{folder} holds something other than an export: name another folder")
    others = sorted(path.name for path in folder.iterdir() if path.name not in NAMES)
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
    files: dict[str, bytes], named: dict[str, int], more: dict, layout: str | None = None
) -> dict[str, bytes] | None:
    """Returns the tokenizer's files with more special tokens and settings; None if the tokens can't get those ids.

    `layout`: post-processor that adds tokens to each text, in JSON, instead of the tokenizer's.
    """
    from tokenizers import Tokenizer as Library

    if FILE_NAME not in files:
        return None
    table, known = json.loads(files[FILE_NAME]), Library.from_buffer(files[FILE_NAME]).get_vocab()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
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


def classifier_files(
    files: dict[str, bytes], task: str, special: SpecialTokens, max_tokens: int
) -> dict[str, bytes] | None:
    """Returns the tokenizer's files changed to lay out a classifier's input; None if it can't have the tokens."""
    from tokenizers.processors import TemplateProcessing

    if FILE_NAME not in files:
        return None
    start, delimiter, extract = SPECIAL_NAMES
    named = dict(zip(SPECIAL_NAMES, special))
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


def check_range(tensors: dict[str, "torch.Tensor"], model: str, dtype: str) -> None:
    """Raises UserError for a tensor with values beyond the range of the type it was converted to, or NotFinite."""
    for name, tensor in tensors.items():
        if tensor.isnan().any() or dtype == "float32" and tensor.isinf().any():
            raise NotFinite(f"{name} of {model} is not finite: export another checkpoint")
        if tensor.isinf().any():
            raise UserError(f"{name} of {model} has values beyond the range of {dtype}: export in float32")


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    check_output(options.output, options.overwrite)

    import torch  # slow: import once the settings are valid
    from safetensors.torch import save_file

    from gpt_arc.alignment.reward_model import is_reward_model
    from gpt_arc.chat.format import load_chat
    from gpt_arc.finetuning.classifier import is_classifier, load_classifier
    from gpt_arc.weights.directory import load_model, model_directory
    from gpt_arc.weights.huggingface import WEIGHTS, hf_classifier_config, hf_classifier_tensors, hf_config, hf_tensors

    classifier = chat = None
    if is_classifier(options.model):
        classifier, tokenizer = load_classifier(options.model)
        model, trained = classifier.trunk, classifier.config
        if trained.lstm:
            raise UserError("the model is an LSTM, and transformers has no architecture for it")
    elif is_reward_model(options.model):
        raise UserError(f"{options.model} is a reward model, and transformers has no class for its head")
    else:
        directory = model_directory(options.model)
        model, tokenizer = load_model(directory)
        chat = tokenizer and load_chat(directory, tokenizer)
    config, dtype = hf_config(model.config, options.dtype), getattr(torch, options.dtype)
    files = {} if tokenizer is None else tokenizer_files(tokenizer, model.config.block_size)
    declared = json.loads(files.pop(GENERATION_FILE, b"{}"))
    if tokenizer is not None:
        config |= special_ids(tokenizer, declared, chat.end if chat else None)
    if classifier is None:
        form, tensors = config["model_type"], dict(hf_tensors(model, dtype))
        files[GENERATION_FILE] = as_json(generation_config(config, declared))
    else:
        special = trained.special
        config = hf_classifier_config(config, trained.task, trained.classes, special.start, trained.dropout)
        tensors = dict(hf_classifier_tensors(model, classifier.head.weight, trained.task, dtype))
        form = config["architectures"][0]
    check_range(tensors, options.model, options.dtype)
    files["config.json"] = as_json(config)
    readme = f"{MARK} from {options.model}, as {form} of transformers.\n"
    if classifier is not None:
        extended = classifier_files(files, trained.task, special, trained.max_tokens)
        files = extended or files
        readme += usage(trained.task, special, trained.max_tokens, named=extended is not None)
    if chat:
        mark = next(mark for mark, id in chat.ids.items() if id == chat.end)
        files.pop(TEMPLATE_FILE, None)  # of the model that it was trained from
        extended = with_special_tokens(files, chat.added, {"chat_template": chat.jinja, "eos_token": mark})
        files = extended or files
    files["README.md"] = readme.encode()
    with new_directory(options.output.resolve()) as temporary:
        with name_failed_writes(options.output), replacing(temporary / WEIGHTS) as path:
            save_file(tensors, path, {"format": "pt"})
        for name, content in files.items():
            write_file(temporary / name, content)
        if chat:
            chat.save(temporary)
        record_files(temporary, *sorted(path.name for path in temporary.iterdir()))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{options.output}: {form}, {parameters:,} parameters in {options.dtype}")
    if classifier is not None and not extended:
        print(f"AutoTokenizer doesn't know {describe_ids(special)}: put these ids around those of a text")
    if chat and not extended:
        print(f"AutoTokenizer doesn't know the ids of the chat's marks: {chat.added}")
    if tokenizer is None:
        print("it has no tokenizer, because the model has none")
    elif SENTENCEPIECE_FILE in files:
        print(f"AutoTokenizer may read {SENTENCEPIECE_FILE} otherwise than SentencePiece: encode with that library")


if __name__ == "__main__":
    entry_point(main)()
