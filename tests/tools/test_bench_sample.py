"""The sampling benchmark: competitors run the same model, figures follow from times, and nothing is left over."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import sample
from gpt_arc.errors import UserError, entry_point
from gpt_arc.weights.directory import save_model
from helpers import ROOT, forking_command, randomised
from model import GPT, GPTConfig
from tools import bench
from warm import WarmPopen

CONFIG = GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=16, activation="gelu")
TOML = "[model]\nblock_size = 32\nvocab_size = 50\nn_layer = 2\nn_head = 2\nn_embd = 16\n"
ROWS, PROMPT, NEW, ROUNDS = 3, 5, 8, 2
SIZES = [f"--batch_size={ROWS}", f"--prompt_tokens={PROMPT}", f"--max_new_tokens={NEW}", f"--rounds={ROUNDS}"]
EAGER = ["--device=cpu", "--dtype=float32", "--compile=False"]

# the interface of nanoGPT's model.py, greedy, which records its calls
NANOGPT = """
import json, pathlib
from dataclasses import dataclass
import torch, torch.nn as nn, torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x):
        parts = [p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.c_attn(x).chunk(3, dim=-1)]
        return self.c_proj(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.n_embd, bias=c.bias), Attention(c)
        self.ln_2, self.mlp = nn.LayerNorm(c.n_embd, bias=c.bias), MLP(c)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd), wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        print("number of parameters: few")

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        prompt = idx
        for _ in range(max_new_tokens):
            x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1)))
            for block in self.transformer.h:
                x = block(x)
            idx = torch.cat((idx, self.lm_head(self.transformer.ln_f(x[:, [-1]])).argmax(-1)), dim=1)
        with open(pathlib.Path(__file__).with_name("calls.jsonl"), "a") as file:
            call = {"prompt": prompt.tolist(), "tokens": idx.tolist(), "training": self.training}
            print(json.dumps(call | {"dtype": str(self.lm_head.weight.dtype)}), file=file)
        return idx
"""


def greedy(model, tokens, count):
    """Greedy decoding by definition: recomputes everything for each token."""
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens.tolist()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run with both peers: its folder, output and results."""
    folder = tmp_path_factory.mktemp("bench")
    save_model(randomised(GPT(CONFIG)), None, folder / "model")
    for name in ("nanoGPT", "tmp"):
        (folder / name).mkdir()
    (folder / "nanoGPT" / "model.py").write_text(NANOGPT)
    flags = [f"--nanogpt={folder / 'nanoGPT'}", "--transformers=True", f"--json={folder / 'results.json'}"]
    completed = forking_command(
        "tools/bench.py", "sample", str(folder / "model"), *SIZES, *EAGER, *flags, TMPDIR=str(folder / "tmp")
    )
    assert completed.returncode == 0 and not completed.stderr, completed.stderr
    return folder, completed.stdout, json.loads((folder / "results.json").read_text())


def test_figures_follow_from_the_times(measured):
    _, output, results = measured
    assert list(results["programs"]) == ["ours", "nanoGPT", "transformers"]
    for row in results["programs"].values():
        prefill, whole = ([times[key] for times in row["rounds"]] for key in ("first_seconds", "whole_seconds"))
        assert len(prefill) == ROUNDS
        steps = [(b - a) / (NEW - 1) for a, b in zip(prefill, whole)]
        assert row["step_ms"] == pytest.approx(
            {"median": 1000 * median(steps), "min": 1000 * min(steps), "max": 1000 * max(steps)}
        )
        assert row["decode_tokens_per_second"] == pytest.approx(ROWS / median(steps))
        assert row["prefill_tokens_per_second"] == pytest.approx(ROWS * PROMPT / median(prefill))
        assert row["first_token_ms"] == pytest.approx(1000 * median(prefill))
        assert row["whole_seconds"]["median"] == median(whole)
        assert 0.05 < row["peak_memory_gb"] < 4 and row["warmup_seconds"] > 0
    for name, ratio in results["ratios"].items():
        pairs = zip(results["programs"]["ours"]["rounds"], results["programs"][name]["rounds"])
        ratios = [peer["whole_seconds"] / ours["whole_seconds"] for ours, peer in pairs]
        assert ratio == pytest.approx({"median": median(ratios), "min": min(ratios), "max": max(ratios)})
        assert f"{name} takes {ratio['median']:.2f} times as long as ours" in output


def test_the_floor_is_what_a_step_has_to_read(measured):
    _, output, results = measured
    floor = results["floor"]
    # two layers of 16 x 48 + 16 x 16 + 2 x 16 x 64 and a head of 50 x 16, four bytes each
    assert floor["weight_bytes"] == (2 * 3072 + 800) * 4 == 27_776
    # the 7 steps see 6 to 12 tokens, 9 on average: in 3 rows and 2 layers, a key and a value of 16, four bytes each
    assert floor["cache_bytes"] == 3 * 9 * 2 * 2 * 16 * 4 == 6912
    assert floor["ms"] == pytest.approx(1000 * 34_688 / floor["bytes_per_second"])
    assert floor["share"] == pytest.approx(floor["ms"] / results["programs"]["ours"]["step_ms"]["median"])
    assert 1e8 < floor["bytes_per_second"] < 1e12
    assert (
        f"read at {floor['bytes_per_second'] / 1e9:.1f} GB/s" in output and f"{floor['ms']:.2f} ms per step" in output
    )


def test_the_floor_of_grouped_banded_gated_layers_in_8_bits():
    config = GPTConfig(
        n_layer=3, n_embd=8, n_head=2, n_kv_head=1, mlp_size=10, vocab_size=11, attention_band=4, activation="swiglu"
    )
    # 8 x (2 + 2) x 4, 2 x 4 x 8 and 3 x 8 x 10 a layer; the second layer sees 4 of 10 tokens
    expected = {"weight_bytes": 3 * (128 + 64 + 240) + 88, "cache_bytes": 2 * (10 + 4 + 10) * 2 * 4 * 2}
    assert sample.step_bytes(config, 2, 10, {"weight": 1, "cache": 2}) == expected


def test_the_table_has_a_row_for_each_competitor(measured):
    _, output, results = measured
    lines = output.splitlines()
    assert lines[0] == f"machine      {results['machine']}" and f"torch {torch.__version__}" in lines[0]
    for name, row in results["programs"].items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        numbers = [float(word.replace(",", "")) for word in line.split()[1:]]
        step = row["step_ms"]
        shown = [row["prefill_tokens_per_second"], row["decode_tokens_per_second"]]
        shown += [step["median"], step["min"], step["max"], row["first_token_ms"], row["whole_seconds"]["median"]]
        assert numbers == pytest.approx([*shown, row["peak_memory_gb"]], abs=0.51, rel=1e-3)
    assert "number of parameters" not in output


def test_nanogpt_runs_unchanged_with_our_weights_and_prompts(measured):
    folder, _, _ = measured
    calls = [json.loads(line) for line in (folder / "nanoGPT" / "calls.jsonl").read_text().splitlines()]
    counts = [len(call["tokens"][0]) - PROMPT for call in calls]
    assert counts == [1, NEW] * (len(counts) // 2) and len(counts) >= 2 * (1 + ROUNDS)
    model = randomised(GPT(CONFIG))
    for call, count in zip(calls, counts):
        assert call["prompt"] == calls[0]["prompt"] and len(call["prompt"]) == ROWS
        assert call["dtype"] == "torch.float32" and not call["training"]
        assert call["tokens"] == greedy(model, torch.tensor(call["prompt"]), count)


def test_only_the_results_are_left(measured):
    folder, _, _ = measured
    assert not list((folder / "tmp").glob("gpt-arc-*"))  # torch keeps other folders there
    assert {path.name for path in folder.iterdir()} == {"model", "nanoGPT", "tmp", "results.json"}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, norm_position="post", activation="gelu_tanh"),
        GPTConfig(
            32, 50, 2, 2, 16, 1, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, qk_norm=True
        ),
    ],
    ids=["gpt2", "openai-gpt", "qwen3"],
)
def test_ours_and_transformers_give_the_same_continuations(config, tmp_path):
    model = randomised(GPT(config))
    sample.write_weights(model, tmp_path, peers=True)
    prompts = torch.randint(50, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    settings = sample.SampleBench("", batch_size=ROWS, prompt_tokens=PROMPT, max_new_tokens=NEW, compile=False)
    job = sample.SampleJob(settings, config, "cpu", "float32", prompts.tolist(), tmp_path)
    expected = greedy(model, prompts, NEW)
    assert [list(row) for row in zip(*sample.OurSampler(job).generate())] == [row[PROMPT:] for row in expected]
    assert sample.TransformersSampler(job).generate(NEW).tolist() == expected


def test_architecture_flags_need_a_config_file(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(TOML + "[data]\nbatch_size = 9\n")
    settings, config = sample.read_arguments(["--n_layer=3", str(file), "--rounds=7", "--batch_size", "2"])
    assert config == GPTConfig(32, 50, 3, 2, 16) and (settings.rounds, settings.batch_size) == (7, 2)
    assert settings.model == str(file)
    with pytest.raises(UserError, match="no flag --n_layer"):
        sample.read_arguments(["out/quickstart", "--n_layer=3"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rounds=0"], "rounds = 0 must be at least 1"),
        (["--max_new_tokens=1"], "max_new_tokens = 1 must be at least 2"),
        (["--n_head=3"], "n_head = 3 does not divide n_embd = 16"),
        (["--round=3"], "there is no flag --round; did you mean --rounds?"),
        (["--nanogpt=nowhere"], "there is no nanoGPT checkout at nowhere: it has no model.py"),
        (["--json=nowhere/results.json"], "there is no folder nowhere for the results"),
        (["--prompt_tokens=33"], "prompt_tokens = 33 is more than the context, block_size = 32"),
        (
            ["--transformers=True", "--max_new_tokens=17"],
            "prompt_tokens + max_new_tokens = 33 is more than the context",
        ),
        (["--nanogpt=.", "--max_new_tokens=17"], "prompt_tokens + max_new_tokens = 33 is more than the context"),
        (
            ["--transformers=True", "--max_new_tokens=9", "--positions=sinusoidal"],
            "no supported architecture of transformers",
        ),
        (
            ["--nanogpt=.", "--max_new_tokens=9", "--norm_eps=1e-3"],
            "nanoGPT only computes GPT-2 and has no norm_eps = 0.001",
        ),
        (
            ["--nanogpt=.", "--max_new_tokens=9", "--activation=relu"],
            'nanoGPT only computes GPT-2 and has no activation = "',
        ),
        (["--device=cuda"], "is not available here"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(flags, sentence, output_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TOML)
    Path("model.py").touch()
    message = output_of(entry_point(bench.main), "tools/bench.py", "sample", "tiny.toml", *flags)
    assert sentence in message


def test_mistakes_without_a_config_file(output_of, tmp_path, monkeypatch):
    run = lambda *args: output_of(entry_point(bench.main), "tools/bench.py", *args)  # noqa: E731
    assert "name a benchmark: python tools/bench.py sample" in run()
    assert "name a benchmark" in run("simple")
    assert "there is no config file" in run("sample", str(tmp_path / "tiny.toml"))
    assert "there is no model directory" in run("sample", str(tmp_path / "nowhere"))
    assert "python tools/bench.py sample --help" in run("--help")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install -e '.[transformers]'" in run("sample", str(tmp_path), "--transformers=True")


def test_an_error_in_a_child_process_is_reported_in_one_sentence(tmp_path):
    (tmp_path / "tiny.toml").write_text(TOML)
    (tmp_path / "model.py").write_text("raise OSError('no\\nluck')")
    flags = [str(tmp_path / "tiny.toml"), *SIZES, *EAGER, f"--nanogpt={tmp_path}"]
    completed = forking_command("tools/bench.py", "sample", *flags, TMPDIR=str(tmp_path))
    assert completed.returncode == 2 and completed.stderr == "bench.py: nanoGPT: OSError: no\n"
    assert not list(tmp_path.glob("gpt-arc-*"))


def processes_of_session(number):
    """Processes of a session, including its leader."""
    processes = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == number and path.joinpath("cmdline").read_bytes():  # empty for a zombie
                processes.append(int(path.name))
        except (ProcessLookupError, FileNotFoundError):
            pass
    return processes


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are counted in /proc")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        ("SIGINT", 130),
        pytest.param("SIGTERM", 130, marks=pytest.mark.slow),
        pytest.param("SIGKILL", -9, marks=pytest.mark.slow),
    ],
)
def test_an_interruption_leaves_no_process_and_no_folder(number, code, tmp_path):
    (tmp_path / "tiny.toml").write_text(TOML)
    (tmp_path / "tmp").mkdir()
    running = WarmPopen(
        [sys.executable, ROOT / "tools/bench.py", "sample", tmp_path / "tiny.toml", *EAGER, "--rounds=100000"],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        # the script, multiprocessing's tracker and our worker
        wait_until(lambda: len(processes_of_session(running.pid)) == 3)
        if number == "SIGINT":
            os.killpg(running.pid, signal.SIGINT)  # as a terminal does, while ours starts
        else:
            time.sleep(1)  # ours is loading or in its rounds
            running.send_signal(getattr(signal, number))
        _, errors = running.communicate(timeout=30)
    except BaseException:
        os.killpg(running.pid, signal.SIGKILL)
        raise
    assert running.returncode == code
    wait_until(lambda: not processes_of_session(running.pid), 5)
    if number != "SIGKILL":
        assert errors == "bench.py: interrupted\n"
        assert not list((tmp_path / "tmp").glob("gpt-arc-*"))
