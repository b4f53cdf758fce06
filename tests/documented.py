"""The commands of documents and examples, how each is shrunk, and stand-ins for the files that they name."""

import contextlib
import csv
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gpt_arc import cli
from gpt_arc.data.tokenizer import BPETokenizer
from helpers import ROOT, TEXT, free_port, write, write_dataset
from nanogpt import ARGUMENTS, tensors_of
from test_docs import FENCE
from warm import WarmPopen

PROGRAM = r"(?:\w+=(?:\"[^\"]*\"|\S+) )*(?:python3?|torchrun|bash|gpt-arc|pip|pre-commit|printf|srun|host=\S+)\s"
SOURCES = [
    path
    for folder in ("examples", "configs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".sh", ".toml")
]

# What isn't run, as patterns of whole commands, with the reason.
NOT_RUN = {
    r"(pip install|python3 -m venv|pre-commit) .*": "installs packages",
    r"(FAKE_GPU_TRITON=\S+ )?python (-m (pytest|fake_gpu)\b|tests/).*": "runs tests",
    r"python new\.py .*": "trains for as long as it takes to measure speed; tests/test_new.py runs it",
    r"python tools/playground\.py .*": "serves until it is stopped; tests/serving runs it",
    r"python tools/report\.py .* --watch": "goes on until it is stopped; tests/reports runs it",
    r"(\w+=1 )?python tools/bench\.py .*|bash tools/gpu_check\.sh": "measures for minutes; tests/tools runs each part",
    r"(\w+=\S+ |\w+=\"[^\"]+\" )*bash examples/(gpt1|gpt4|in_context|instructgpt|long_context|moe|relatives)_arc\.sh":
    "trains many models; tests/test_messages.py compares the flags of its commands with --help",
    r"python \S+ out/(gpt4_arc|moe_arc|in_context|relatives)\b.*": "needs what such an example trains",
    r"python examples/\w+_report\.py .*": "reads the results of such an example; tests/examples runs it",
    r"python tools/runs\.py --remove .*": "asks at the terminal; tests/tools/test_runs.py runs it",
    r"(\w+=\S+ )?python examples/long_context_memory\.py.*": "measures memory in processes of its own, for minutes",
    r"python examples/(gpt1_\w+|mixtures|worked_numbers)\.py.*": "takes minutes; tests/examples does",
    r"python stages/eval\.py .* --tasks (lambada|cbt_cn|gsm8k|hellaswag|race).*": "downloads a benchmark",
    r"python -m gpt_arc\.harness .*": "downloads a benchmark; tests/evaluation/test_harness.py runs it",
    r"python prepare/(openwebtext|tinyshakespeare)\.py": "downloads a corpus; tests/prepare has a stand-in",
    r"python (data/|bench\.py|train\.py config/|sample\.py --out_dir=out-).*": "nanoGPT's",
    r"bash runs/speedrun\.sh": "nanochat's",
    r"gpt-arc (train|sample|report|from-nanogpt|prepare X)|python (train|prepare/(text|X))\.py": "names a program",
    r"python stages/scaling\.py sweep .*": "trains for minutes or hours; tests/stages/test_scaling.py runs small ones",
    r"python stages/scaling\.py claim .*": "exits with 1 for an impossible claim; tests/stages/test_scaling.py runs it",
    r".* \.\.\.( .*)?": "leaves out settings that stand above it",
    r"(host=|srun ).*": "needs Slurm",
}  # fmt: skip

# Flags that shrink what a script does; they come last, so that they win over those of the document.
TRAIN = "--max_iters=2 --eval_interval=2 --eval_iters=1 --batch_size=2 --gradient_accumulation_steps=1 --threads=1"
TRAIN += " --compile=False --device=cpu"
MODEL = "--n_layer=2 --n_head=4 --n_embd=32 --mlp_size=64 --block_size=64"
STAGE = "--batch_size=4 --gradient_accumulation_steps=1 --threads=1"
SMALL = {
    "train.py": TRAIN,
    "sample.py": "--max_new_tokens=4 --compile=False",
    "prepare/text.py": "--val_fraction=0.3",
    "prepare/tokenizer.py": "--vocab_size=300",
    "stages/sft.py": f"{STAGE} --epochs=1",
    "stages/reward.py": f"{STAGE} --epochs=1",
    "stages/dpo.py": f"{STAGE} --epochs=1",
    "stages/ppo.py": f"{STAGE} --episodes=8 --minibatches=1 --max_new_tokens=4 --rollout_batch_size=8",
    "stages/finetune.py": f"{STAGE} --epochs=1",
    "stages/translate.py": f"{STAGE} --epochs=1 --n_layer=1 --encoder_layers=1 --n_embd=16 --n_head=2 --block_size=32",
    "stages/pretrain_encoder.py": f"{STAGE} --epochs=1",
    "stages/scaling.py fit": "--resamplings=5",
    "stages/scaling.py predict": "--resamplings=5",
    "examples/long_context_data.py": "--documents=3000",
    "examples/in_context_data.py": "--documents=100 --held_out=1 --items=3 --pool=20",
    "examples/moe_experts.py": "--experts 1 4 --compared=4 --seeds=1 --max_iters=2",
    "examples/in_context_sizes.py": "--widths 8 --max_iters=2",
    "examples/in_context_labels.py": "--seeds=1 --max_iters=2",
    "examples/chain_of_thought.py": "--widths 8 --seeds=1 --max_iters=2 --problems=5",
    "examples/norm_position.py": "--depths 1 --seeds=1 --max_iters=2",
    "examples/word_senses.py": "--seeds=1 --max_iters=2 --n_layer=1 --sentences=40",
    "examples/coordinate_check.py": "--widths 16 32 --steps=1",
    "examples/in_context_linear.py": "--max_iters=2 --functions=10",
    "examples/instructions_data.py": "--documents=100 --demonstrations=20 --train=20 --test=5",
    "examples/instruction_judge.py": "--limit=5",
    "stages/eval.py": "--limit=3 --threads=1",
}
STAND_INS = {  # in the text of commands
    "--tokenizer gpt2": "--tokenizer tiny",  # tiktoken downloads its merges
    "--stride 512": "--stride 8",
    "--block_size=8192": "--block_size=128",
    "--rotary_context=1024": "--rotary_context=64",
    "--context 1024": "--context 64",
    "=RATE": "=1e-3",
    "/shared/": "",
    "HOST": "localhost",
    "report.py RUN": "report.py quickstart",
    " DATASET": " python_manual",
    "--perplexity instructgpt_text": "--perplexity mine",  # its tokenizer is that of the stand-ins
}
SWEEPS = {  # and the results that stand in for theirs
    "scaling_mini": "scaling_mini",
    "scaling_shapes": "scaling_shapes",
    "base_width": "scaling_rates",
    "no_base_width": "scaling_rates_plain",
}
BEFORE = {  # what a page takes for granted
    "examples/instruction_judge.py": [
        "python examples/instructions_data.py",
        "python examples/instruction_judge.py out/sft --rank data/instructgpt/test.jsonl --output ranked.jsonl",
        "mv ranked.jsonl held_out.jsonl && cp -r out/sft out/ppo",
    ]
}
AS_IT_IS = {"--help", "--resume", "--dry_run", "--preview", "--classify", "--predict"}  # no training, or a shrunk run's


def commands_of(page: Path) -> list[str]:
    """The commands of a page, in order: lines of its blocks of shell, and commands within sentences and tables."""
    if page.suffix != ".md":
        return list(commands_in_comments(page))
    commands = []
    for match in re.finditer(rf"{FENCE.pattern}|(?<!`)`({PROGRAM}[^`]+)`", page.read_text(), re.MULTILINE | re.DOTALL):
        language, block, within = match.groups()
        if within:
            commands.append(" ".join(within.split()))
        elif language in ("sh", "bash"):
            commands += [line for line in block.replace("\\\n", " ").splitlines() if re.match(r"\s*[^#\s]", line)]
    return commands


def commands_in_comments(path: Path) -> Iterator[str]:
    """The commands in the comments or the docstrings of an example or a config."""
    text = re.sub(r"\\\\\n|\n#\s{6,}(?=--)", " ", path.read_text())  # a command of several lines
    start = r"^ {4}" if path.suffix == ".py" else r"^# +"
    for line in re.findall(rf"{start}({PROGRAM}[a-z].*)$", text, re.MULTILINE):
        yield re.split(r"\s{2,}(?=[a-z])", line)[0]


def reason_not_to_run(command: str) -> str | None:
    bare = re.sub(r"\s+# .*", "", command)
    return next((reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, bare)), None)


def shrunk(script: str, arguments: list[str]) -> list[str]:
    """The arguments with those that make it a matter of a moment."""
    names = {argument.split("=")[0] for argument in arguments}
    more = SMALL.get(" ".join([script, *arguments[:1]]), SMALL.get(script, "")).split()
    if AS_IT_IS & names:
        return arguments
    if "--tokens_per_step" in names:  # the other way to state the same
        more[more.index("--gradient_accumulation_steps=1")] = "--tokens_per_step=2048"
    more += [
        f"{name}={number}" for name, number in {"--warmup_iters": 1, "--expert_processes": 2}.items() if name in names
    ]
    started = any(re.match(r"--init_from(?!=(scratch|auto|resume))", argument) for argument in arguments)
    if script == "train.py" and not started:  # else the model's shape is given
        more += MODEL.split()
    return [*arguments, *more]


class Shell:
    """Runs lines of bash in which python, torchrun and gpt-arc are forks of the warm process, with shrunk arguments."""

    CLIENT = """#!{python} -SE
import json, os, socket, sys
channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
channel.connect({address!r})
if sys.argv[1] == "-":
    sys.argv[1:2] = ["-c", sys.stdin.read()]
socket.send_fds(channel, [json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
sys.exit(int(channel.recv(100)))
"""

    def __init__(self, folder: Path):
        """`folder` is a new one, for the programs."""
        address = str(folder / "socket")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()
        for name in ("python", "torchrun", "gpt-arc"):
            (folder / name).write_text(self.CLIENT.format(python=sys.executable, address=address))
            (folder / name).chmod(0o755)
        self._path = f"{folder}:{os.environ['PATH']}"
        self._running: set[WarmPopen] = set()

    def failure(self, line: str, folder: Path) -> str:
        """Runs a line in a folder; returns "", or the line and its output if it fails."""
        for text, stand_in in STAND_INS.items():
            line = line.replace(text, stand_in)
        environment = {"PATH": self._path, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
        try:
            result = subprocess.run(
                ["bash", "-c", line], cwd=folder, env=os.environ | environment, input="y\n", text=True, timeout=120,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            for process in set(self._running):
                process.kill()
            return f"{line}\ntakes more than two minutes"
        return f"{line}\n{result.stdout}" if result.returncode else ""

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            request, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
            (program, *arguments), folder, environment = json.loads(request)
            try:
                status = self._execute(Path(program).name, arguments, folder, environment, streams)
            finally:
                for stream in streams:
                    os.close(stream)
            with contextlib.suppress(OSError):  # the line took too long
                connection.send(str(status % 256).encode())

    def _execute(self, program, arguments, folder, environment, streams) -> int:
        processes = 1
        if program == "torchrun":
            processes, arguments = 2, arguments[next(i for i, word in enumerate(arguments) if word.endswith(".py")) :]
        elif program == "gpt-arc" and arguments[0].startswith("-"):
            arguments = [str(ROOT / "gpt_arc/cli.py"), *arguments]
        elif program == "gpt-arc":
            arguments = cli.script_command(arguments[0], arguments[1:])
        if arguments[0] != "-c":
            script = Path(folder, arguments[0]).resolve()
            arguments = [str(script), *shrunk(str(script.relative_to(ROOT)), arguments[1:])]
        places = [{}] if processes == 1 else [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
        if processes > 1:
            environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        started = [
            WarmPopen(
                [sys.executable, *arguments], cwd=folder, env=environment | place,
                stdin=streams[0], stdout=streams[1], stderr=streams[2],
            )
            for place in places
        ]  # fmt: skip
        self._running |= set(started)
        try:
            return next(filter(None, [process.wait() for process in started]), 0)
        finally:
            self._running -= set(started)


LINKS = ("model.py", "train.py", "sample.py", "new.py", "configs", "examples", "prepare", "stages", "tasks", "tools")
DATASETS = "mine openwebtext fineweb python_manual tinyshakespeare gpt1_text docstrings instructgpt_text".split()
DATASETS += ["long_64", "long_512"]
MODELS = """
python train.py configs/gpt2.toml
python train.py configs/modern.toml
python train.py configs/moe.toml
python train.py configs/bert_mini.toml
python stages/sft.py out/gpt2 --train chats.jsonl
python stages/reward.py out/sft --train rankings.jsonl
python stages/finetune.py out/gpt2 --train reviews.jsonl
python stages/translate.py --train pairs.jsonl --tokenizer tiny
python train.py configs/quickstart.toml
python train.py configs/quickstart.toml
python tools/export.py out/gpt2 exported --to hf
"""
COPIES = {"gpt1": "gpt2", "base": "gpt2", "text": "gpt2", "tinyshakespeare": "gpt2"}
ROWS = [
    {
        "text": f"the film was {word} {i}", "label": word, "score": i / 2, "image": "cat.png",
        "prompt": f"{i} times 2", "response": f"{2 * i}", "chosen": f"{2 * i}", "rejected": "no",
        "question": f"{i} plus 1", "q": f"{i} plus 1", "answer": "0", "source": f"{i} times", "target": f"{i}",
        "text_a": f"a {i}", "text_b": f"b {i}", "first": f"a {i}", "second": f"b {i}", "options": ["a", "b"],
    }
    for i, word in enumerate(("great", "terrible") * 10)
]  # fmt: skip
CHOICES = [{"start": "it is", "label": i % 4, **{f"end{k}": f"{k} {i}" for k in range(4)}} for i in range(16)]
ROW_FILES = """
chats held_out chats_val rankings rankings_val prompts sums reviews test new val images labels pairs lambada race/items
data/shapes/test data/gpt1_arc/corpus data/gpt1_arc/package/train
""".split()


def fill(folder: Path, shell: Shell) -> None:
    """Makes a clone with the files, datasets and models that documents name, all tiny, and nanoGPT beside it."""
    write_nanogpt(folder / "nanoGPT")
    folder = folder / "clone"
    folder.mkdir()
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    (folder / "instruction_judge.py").symlink_to(ROOT / "examples/instruction_judge.py")  # as with PYTHONPATH=examples
    write_texts(folder)
    write_rows(folder)
    write_images(folder)
    tokenizer = BPETokenizer({bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256})
    tokens = np.array([token for line in 12 * TEXT.splitlines() for token in (*tokenizer.encode(line), 256)])
    write_dataset(folder / "data/tiny", tokenizer, {"train": tokens, "val": tokens[: len(tokens) // 8]})
    for name in DATASETS:
        (folder / "data" / name).symlink_to("tiny")
    for line in MODELS.strip().splitlines():
        assert not (failure := shell.failure(line, folder)), failure
    for copy, model in COPIES.items():
        shutil.copytree(folder / "out" / model, folder / "out" / copy, symlinks=True)
    for name in ("gpt2", "gpt2-xl"):  # as if they were downloaded
        cache = folder / f"hub/models--openai-community--{name}"
        shutil.copytree(folder / "exported", cache / "snapshots/0")
        (cache / "refs").mkdir()
        (cache / "refs/main").write_text("0")
    shutil.rmtree(folder / "exported")
    for name, results in SWEEPS.items():
        (folder / "out" / name).mkdir()
        shutil.copy(ROOT / f"docs/results/{results}.json", folder / "out" / name / "results.json")


def write_texts(folder: Path) -> None:
    folders = [f"{name}/{i}.txt" for name in ("folder", "pages", "books") for i in range(20)]
    for name in ("book.txt", "stdlib.txt", "wiki.test.tokens", *folders):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}\n{TEXT}")  # a hash of the text assigns a document to a split
    (folder / "prompt.txt").write_text("The ")
    (folder / "questions.txt").write_text("1 times\n2 times 3\n")
    (folder / "mine.toml").write_text("[training]\nseed = 1\n")
    (folder / "sft.toml").write_text('model = "out/gpt2"\ntrain = "chats.jsonl"\n')
    (folder / "rules.py").write_text("def correct(rows, responses):\n    return [len(text) for text in responses]\n")
    (folder / "sums.toml").write_text(dict(FENCE.findall((ROOT / "docs/guide/evaluate.md").read_text()))["toml"])


def write_rows(folder: Path) -> None:
    """Tables in every format; each has every column that a document names."""
    import pyarrow
    from pyarrow import parquet

    for name in ROW_FILES:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        write(folder / f"{name}.jsonl", ROWS)
    write(folder / "new.jsonl", [{"text": row["text"]} for row in ROWS])
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "add", "input": "1 1", "output": "2"}] * 8))
    for name, rows, separator in (
        ("pairs.csv", ROWS, ","),
        ("swag.csv", CHOICES, ","),
        ("mnli.tsv", ROWS, "\t"),
        ("dev.tsv", ROWS, "\t"),
    ):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    (folder / "crawl").mkdir()
    questions = pyarrow.Table.from_pylist(
        [{name: row[name] for name in ("text", "question", "answer")} for row in ROWS]
    )
    for name in ("qa.parquet", "crawl/a.parquet"):
        parquet.write_table(questions, folder / name)
    with pyarrow.CompressedOutputStream(str(folder / "more.jsonl.zst"), "zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())


def write_images(folder: Path) -> None:
    import transformers
    from PIL import Image

    for place in ("", "data/shapes", "data/shapes/pictures"):
        (folder / place).mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (12, 12), "red").save(folder / place / "cat.png")
    sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=9)
    vision = transformers.CLIPVisionConfig(**sizes, patch_size=3)
    transformers.CLIPVisionModel(vision).save_pretrained(folder / "clip")
    text = transformers.Qwen3Config(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    both = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=259)
    transformers.LlavaForConditionalGeneration(both).save_pretrained(folder / "llava")


def write_nanogpt(folder: Path) -> None:
    for name in ("out-shakespeare-char", "config", "data/shakespeare_char", "data/openwebtext"):
        (folder / name).mkdir(parents=True)
    meta = {"vocab_size": 7, "itos": dict(enumerate("abcdefg")), "stoi": {c: i for i, c in enumerate("abcdefg")}}
    for name in ("shakespeare_char", "openwebtext"):
        (folder / "data" / name / "meta.pkl").write_bytes(pickle.dumps(meta))
    for split in ("train", "val"):
        (np.arange(700) % 7).astype(np.uint16).tofile(folder / f"data/openwebtext/{split}.bin")
    content = {"model": tensors_of(True), "model_args": ARGUMENTS | {"bias": True}, "iter_num": 5, "config": {}}
    torch.save(content, folder / "out-shakespeare-char/ckpt.pt")
    (folder / "config/train_gpt2.py").write_text("wandb_log = True\nbatch_size = 12\nblock_size = 1024\n")
