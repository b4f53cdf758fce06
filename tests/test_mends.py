"""What messages advise works: each message is provoked, then its command or flag is run in the same folder."""

import importlib
import re
import shlex
import shutil

import numpy as np
import pytest
import torch

from documented import SMALL, shrunk, write_nanogpt
from gpt_arc.chat.format import TEMPLATES, ChatFormat
from gpt_arc.data.tokenizer import BPETokenizer
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.model import VisionGPT, save_vision
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import save_model
from helpers import ROOT, TEXT, TINY_FLAGS, write, write_dataset
from model import GPT, GPTConfig

BYTES = BPETokenizer({bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256})
CHAT = ChatFormat.new(TEMPLATES["markers"], BYTES, 257)
STAND_INS = {  # for the words in capitals of a command
    "CHATS.jsonl": "chats.jsonl",
    "IMAGES.jsonl": "images.jsonl",
    "FILE.toml": "sweep.toml",
    "ENCODER": "encoder.toml",
    "UPCYCLED": "new",
    "FOLDER": "new",
    "CONFIG": "sums.toml",
    "MODEL": "base",
    "SOURCE": "2",
    "FILE_OR_FOLDER": "book.txt",
    "--tokenizer gpt2": "--tokenizer data/spelling",
    "TEXT": "book.txt",
    "NAME": "sums",
}
slow = pytest.mark.slow


def gpt(**settings):
    return GPT(GPTConfig(64, CHAT.vocab_size, 1, 2, 16, **settings))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with tiny models, datasets and rows."""
    folder = tmp_path_factory.mktemp("prepared")
    torch.manual_seed(0)
    tokens = np.array([token for line in TEXT.splitlines() for token in (*BYTES.encode(line), 256)])
    write_dataset(folder / "data/sums", BYTES, {"train": tokens, "val": tokens[:1100]})
    (folder / "data/spelling").mkdir()
    BYTES.save(folder / "data/spelling")
    modern = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "bias": False}
    for name in ("base", "chat", "sees"):
        save_model(text := gpt(**modern), BYTES, folder / name)
    for name in ("chat", "sees"):
        CHAT.save(folder / name)
    clip = EncoderConfig(8, 4, 1, 2, 8, class_token=True, patch_bias=False, first_norm=True, final_norm=False)
    save_vision(VisionGPT(text, ImageEncoder(clip), Projector(ProjectorConfig(), 8, 16)), folder / "sees")
    save_model(gpt(attention="bidirectional"), BYTES, folder / "both_ways")
    save_model(gpt(encoder_layers=1), BYTES, folder / "translates")
    save_model(gpt(activation="gelu"), BYTES, folder / "erf")
    write(folder / "chats.jsonl", [{"prompt": f"{i} times 2", "response": f"{2 * i}"} for i in range(8)])
    write(folder / "rankings.jsonl", [{"prompt": f"{i}", "chosen": f"{i}", "rejected": "no"} for i in range(8)])
    write(folder / "pairs.jsonl", [{"source": f"{i} times 2", "target": f"{2 * i}"} for i in range(8)])
    write(folder / "labels.jsonl", [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(8)])
    write(folder / "images.jsonl", [{"image": "red.png", "prompt": "what?", "response": "red"}] * 8)
    shutil.copy(ROOT / "docs/results/quickstart.png", folder / "red.png")
    (folder / "encoder.toml").write_text("image_size = 8\npatch_size = 4\nn_layer = 1\nn_head = 2\nn_embd = 8\n")
    (folder / "sums.toml").write_text('[data]\ndataset = "sums"\n')
    shutil.copy(ROOT / "configs/sweeps/scaling_mini.toml", folder / "sweep.toml")
    shutil.copy(ROOT / "configs/sweeps/scaling_large.toml", folder / "large.toml")
    shutil.copy(ROOT / "docs/results/scaling_mini.json", folder / "scaling.json")
    (folder / "book.txt").write_text(TEXT)
    write_nanogpt(folder / "nanoGPT")
    return folder


@pytest.fixture
def run(prepared, tmp_path, monkeypatch, main_runner):
    """Runs a line in a copy of that folder. Returns the exit code and what is printed."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)

    def call(line):
        script, *arguments = shlex.split(line)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        result = main_runner(module, script, *arguments)
        assert "Traceback" not in result.message
        return result.code, result.output + result.message

    return call


QUICKSTART = "--dry_run --dataset=sums"
TRANSLATE = SMALL["stages/translate.py"]


@pytest.mark.parametrize(
    ("line", "more"),
    [
        ("sample.py", QUICKSTART),
        ("tools/runs.py", QUICKSTART),
        ("train.py", QUICKSTART),
        ("train.py nanoGPT/config/train_gpt2.py", ""),
        ("tools/from_nanogpt.py nanoGPT/config/train_gpt2.py mine.toml", QUICKSTART),
        ("tools/from_nanogpt.py nanoGPT/out-shakespeare-char/ckpt.pt new --meta nanoGPT/data/openwebtext/meta.pkl", ""),
        ("train.py sums.toml --dataset=nanoGPT/data/openwebtext", ""),
        pytest.param("train.py sums.toml --dataset=book.txt", "", marks=slow),
        ("prepare/show.py spelling", "--name=new"),
        ("stages/eval.py translates --perplexity=sums", ""),
        ("stages/eval.py both_ways --perplexity=sums", ""),
        ("tools/expert_use.py base --dataset=sums", ""),
        ("train.py sums.toml --init_from=base --n_experts=4", ""),
        ("tools/export.py sees hf --to=hf", ""),
        ("tools/export.py sees sees.onnx --to=onnx", ""),
        ("stages/scaling.py fit out/sweep", "--commands"),
        ("stages/scaling.py plan --flops=1e17 --output=new.toml", "--dry_run"),
        pytest.param("stages/eval.py base --checkpoints --perplexity=sums", "--out_dir=run", marks=slow),
        pytest.param("stages/sft.py", "--train=chats.jsonl", marks=slow),
        pytest.param(f"stages/translate.py --train=pairs.jsonl --tokenizer=data/spelling {TRANSLATE}", "", marks=slow),
        pytest.param(
            "stages/scaling.py predict scaling.json large.toml --resamplings=5 --share=0.1", "--commands", marks=slow
        ),
        pytest.param("sample.py --chat base", "", marks=slow),
        pytest.param("sample.py --chat chat --image=red.png", "", marks=slow),
        pytest.param("tools/image_attention.py chat --image=red.png --question=what? --plot=a.png", "", marks=slow),
    ],
)
def test_the_command_of_a_message_works(run, line, more):
    """`more` is added to the command, for what the message can't know."""
    _, message = run(line)
    advised = re.search(r"\bpython (\S+\.py[^`;\n]*)", message)
    assert advised, message
    command = advised[1]
    for text, stand_in in STAND_INS.items():
        command = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", stand_in, command)
    script, *arguments = shlex.split(f"{command} {more}")
    code, output = run(shlex.join([script, *shrunk(script, arguments)]))
    assert code == 0, f"{message}\n{output}"


CHATS = "prepare/text.py --input chats.jsonl --tokenizer=data/spelling --name=new"
CLEAN = "prepare/decontaminate.py clean --input book.txt --words=3 --output=new.jsonl"
TRAIN = f"train.py sums.toml {' '.join(TINY_FLAGS)} --out_dir=run"
NANOGPT = "tools/from_nanogpt.py nanoGPT/out-shakespeare-char/ckpt.pt new --tokenizer=data/spelling"


@pytest.mark.parametrize(
    ("lines", "flag"),
    [
        (["prepare/text.py --input book.txt --tokenizer=data/spelling --name=sums"], "--overwrite=True"),
        ([f"{CHATS} --field=prompt"], "--split=tail"),
        ([f"{CHATS} --split=tail"], "--field=prompt"),
        (["prepare/text.py --input nanoGPT --tokenizer=data/spelling --name=new"], "--pattern=*.py"),
        (["prepare/tokenizer.py --input book.txt --name=spelling --vocab_size=270"], "--overwrite=True"),
        ([CLEAN], "--items=chats.jsonl"),
        ([f"{CLEAN} --items=chats.jsonl --item_fields=question"], "--item_fields=prompt"),
        (["tools/export.py base new --to=hf"] * 2, "--overwrite=True"),
        (["tools/export.py erf erf.gguf --to=gguf"], "--to=hf"),
        (["tools/upcycle.py base new --n_experts=2", "tools/expert_use.py new"], "--dataset=sums"),
        ([NANOGPT], "--meta=nanoGPT/data/openwebtext/meta.pkl"),
        (["stages/scaling.py plan"], "--flops=1e17"),
        (["stages/eval.py base"], "--perplexity=sums"),
        (["sample.py both_ways"], "--start=The [MASK] is"),
        pytest.param(
            ["tools/upcycle.py base a --n_experts=2", "tools/export.py a a.onnx --to=onnx"], "--to=hf", marks=slow
        ),
        pytest.param(["stages/scaling.py predict scaling.json large.toml --resamplings=5"], "--share=0.1", marks=slow),
        pytest.param([TRAIN, TRAIN], "--overwrite=True", marks=slow),
        pytest.param(["stages/dpo.py chat"], "--train=rankings.jsonl", marks=slow),
        pytest.param(["stages/reward.py chat"], "--train=rankings.jsonl", marks=slow),
        pytest.param(["stages/finetune.py base"], "--train=labels.jsonl", marks=slow),
    ],
)
def test_the_flag_that_a_message_names_mends_the_line(run, lines, flag):
    """The lines before the last succeed; the last is refused without the flag and succeeds with it."""
    for line in lines[:-1]:
        assert run(line)[0] == 0
    code, message = run(lines[-1])
    assert code == 2 and flag.split("=")[0] in message, message
    script, *arguments = shlex.split(lines[-1])
    code, output = run(shlex.join([script, *shrunk(script, [*arguments, flag])]))
    assert code == 0, f"{message}\n{output}"
