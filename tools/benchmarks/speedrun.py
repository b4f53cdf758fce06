"""`bench.py speedrun`: seconds of training until a loss on held-out text is reached.

    python tools/bench.py speedrun configs/speedrun_cpu.toml --target=1.886
    python tools/bench.py speedrun configs/speedrun_cpu.toml --target=1.886 --nanogpt=../nanoGPT --seeds 1 2 3
    python tools/bench.py speedrun configs/quickstart.toml --eval_interval=50 --nanogpt=../nanoGPT --json=record.json

All other flags are train.py's. The loss is the mean over the whole val split except its first token, in adjacent
windows as long as the competitor's context. A run's time ends at its first evaluation at or below the target:

- ours: `python train.py CONFIG FLAGS --eval_iters=0 --seed=S`, in a temporary folder and with an empty compile cache.
  The seconds come from its metrics.jsonl: the optimizer steps, including reading data. Start-up, compilation, and
  evaluation with checkpoints and logs (and the compilation of the evaluation) are shown separately.
- nanoGPT, from your checkout: its README's training on a CPU, with its model, optimizer, learning rates and random
  windows, on the same dataset, in float32 and not compiled; 2,000 steps of 12 x 64 tokens. Its loss is measured every
  250 steps and not timed; its own estimates, prints and checkpoints are omitted.

The competitors take turns, seed by seed. Without --target, or with --target=nanogpt, the target is the loss at which
nanoGPT ends, the median over the seeds. The exit code is 1 if one of our runs doesn't reach it. The floor is the
(active) FLOPs of training up to the target, at the rate measured between the runs for products of two 1024 x 1024
matrices.
"""

import contextlib
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import MinLen
from pydantic.dataclasses import dataclass

from benchmarks.processes import (
    check_requirements,
    child_process,
    config_files,
    json_settings,
    machine_name,
    spread,
    synchronized_time,
    with_config_file,
    write_results,
)
from gpt_arc.errors import UserError
from gpt_arc.files import HELP, command
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Positive, ResultFile, Seed
from gpt_arc.tables import counted

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
TRAIN_FILE = "train.bin"  # tokens in nanoGPT's format: 16 bits each, no header
EVALUATED_AT_ONCE = 64  # windows per batch in nanoGPT's evaluation


@dataclass(frozen=True, config=STRICT)
class SpeedrunBench:
    target: Positive | Literal["nanogpt"] | None = None
    """The loss to reach, in nats per token. nanogpt or None: the final loss of nanoGPT's training."""
    nanogpt: Path | None = None
    """A nanoGPT checkout (the folder with its model.py) to measure too."""
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = (1337,)
    """Different seeds; each program runs once per seed."""
    json: ResultFile | None = None
    """A file for the results."""

    def __post_init__(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds} must be different numbers")
        if self.nanogpt is None and self.target is None:
            raise ValueError("say which loss to reach: --target=1.886, or --nanogpt=PATH for the one it ends at")
        if self.nanogpt is None and self.target == "nanogpt":
            raise ValueError("target = nanogpt takes a checkout: --nanogpt=PATH")


class Evaluation(NamedTuple):
    step: int
    tokens: int  # trained on so far
    seconds: float  # of training so far
    val_loss: float  # nats per token


class SpeedrunRun(NamedTuple):
    """A competitor's run; its times are parts of `wall`, in seconds."""

    evaluations: list[Evaluation]
    start_up: float
    compilation: float | None  # None: not compiled
    evaluation: float  # for ours, includes checkpoints and logs
    wall: float
    dtype: str


def train_ours(args: Sequence[str], seed: int, advance: Callable[[int], None]) -> SpeedrunRun:
    """Runs train.py with `args`; calls `advance` with the number of steps done. Raises UserError if it fails."""
    with tempfile.TemporaryDirectory(prefix="gpt-arc-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        out, errors = folder / "run", folder / "errors.txt"
        flags = ["--eval_iters=0", f"--seed={seed}", f"--out_dir={out}"]
        scratch = folder / "scratch"  # compilers leave files there when they are killed
        scratch.mkdir()
        environment = {**os.environ, "TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
        dtype, compiling, compiled, line = "", None, True, ""
        start = time.time()
        with subprocess_group([sys.executable, str(TRAIN), *args, *flags], environment, errors) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("compiling "):
                    compiling = time.time()
                elif line.startswith("not compiled "):
                    compiled = False
                elif device := re.match(r"device .*, (\w+), (not )?compiled: ", line):
                    dtype = device[1]
                elif step := re.match(r"step (\d+): ", line):
                    advance(int(step[1]))
            code = process.wait()
        end = time.time()
        if code and not (code == 1 and " has diverged, " in line):
            message = (errors.read_text().strip() or f"it ended with {code}").splitlines()[-1]
            raise UserError(f"ours, seed {seed}: {message.removeprefix('train.py: ')}")
        first_step = (out / "run.json").stat().st_mtime  # train.py writes it last before its first step
        evaluations, training = read_evaluations(out / "metrics.jsonl")
        return SpeedrunRun(
            evaluations,
            start_up=(compiling or first_step) - start,
            compilation=first_step - compiling if compiling and compiled else None,
            evaluation=end - first_step - training,
            wall=end - start,
            dtype=dtype,
        )


@contextlib.contextmanager
def subprocess_group(command: list[str], environment: dict[str, str], errors: Path) -> Iterator[subprocess.Popen]:
    """Runs the block with a subprocess that a terminal's Ctrl-C doesn't reach; kills it and its children at the end."""
    with open(errors, "w") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, text=True, env=environment,
            process_group=0,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def read_evaluations(path: Path) -> tuple[list[Evaluation], float]:
    """Returns the evaluations in a metrics.jsonl, and its last line's seconds of training."""
    from gpt_arc.training.log import read_metrics

    lines = read_metrics(path)
    evaluations = [Evaluation(**{n: line[n] for n in Evaluation._fields}) for line in lines if "val_loss" in line]
    return evaluations, lines[-1]["seconds"] if lines else 0.0


@dataclasses.dataclass(frozen=True)
class SpeedrunJob:
    """Input of a child process."""

    checkout: Path
    config: Any  # Config; importing it would import torch
    device: str
    dataset: Path  # its val split is evaluated
    folder: Path  # contains TRAIN_FILE


def nanogpt_recipe(vocab_size: int, seed: int) -> Any:
    """nanoGPT's CPU recipe as our `Config`: its config/train_shakespeare_char.py with the flags of its README."""
    from gpt_arc.training.config import Config, DataConfig, LoggingConfig, TrainingConfig
    from model import GPTConfig

    return Config(
        GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=4, n_head=4, n_embd=128, bias=False, dropout=0.0),
        DataConfig(batch_size=12),
        TrainingConfig(
            max_iters=2000, learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, schedule="cosine", weight_decay=0.1,
            beta1=0.9, beta2=0.99, grad_clip=1.0, seed=seed,
        ),
        LoggingConfig(eval_interval=250),
    )  # fmt: skip


class NanoGPTSpeedrun:
    """A nanoGPT run, in segments from one evaluation to the next."""

    def __init__(self, job: SpeedrunJob):
        from benchmarks.train import NanoGPTTrainer, TrainBench, TrainJob
        from gpt_arc.data.datasets import Split
        from gpt_arc.data.token_files import TokenFiles

        settings = TrainBench(nanogpt=job.checkout)
        self.trainer = NanoGPTTrainer(TrainJob(settings, job.config, job.device, "float32", compile=False))
        self.config, self.step, self.seconds = job.config, 0, 0.0
        self.tokens = job.folder / TRAIN_FILE
        self.val = Split([TokenFiles(job.dataset, "val", job.config.model.vocab_size)], [1.0])

    def next_batch(self) -> list[Any]:
        """Returns tokens and targets of random windows; maps the file again for each batch, as nanoGPT does."""
        import torch

        rows, length = self.trainer.shape
        tokens = np.memmap(self.tokens, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - length, (rows,)).tolist()
        batch = []
        for shift in (0, 1):
            windows = [tokens[start + shift : start + shift + length].astype(np.int64) for start in starts]
            batch.append(torch.stack([torch.from_numpy(window) for window in windows]).to(self.trainer.device))
        return batch

    def segment(self) -> tuple[Evaluation, float]:
        """Trains until the next evaluation; returns it and the seconds that evaluating took."""
        from gpt_arc.training.schedule import learning_rate_at

        trainer, training = self.trainer, self.config.training
        until = min(self.step + self.config.logging.eval_interval, training.max_iters)
        start = synchronized_time(trainer.device)
        while self.step < until:
            for group in trainer.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.step, training)
            loss = trainer.forward(*self.next_batch())
            trainer.backward(loss)
            trainer.update(loss)
            self.step += 1
        trained = synchronized_time(trainer.device)
        self.seconds += trained - start
        tokens = self.step * math.prod(trainer.shape)
        evaluation = Evaluation(self.step, tokens, self.seconds, self.val_loss())
        return evaluation, synchronized_time(trainer.device) - trained

    def val_loss(self) -> float:
        """Mean over the whole val split."""
        import torch

        from gpt_arc.data.batches import evaluation_batches
        from gpt_arc.nn.head_loss import IGNORED

        model, block_size, total, count = self.trainer.model, self.config.model.block_size, 0.0, 0
        model.eval()
        with torch.no_grad():
            starts = self.val.evaluation_starts(block_size, 0)
            for tokens, targets in evaluation_batches(self.val, starts, EVALUATED_AT_ONCE, block_size):
                scored = int((targets != IGNORED).sum())
                mean = model(tokens.to(self.trainer.device), targets.to(self.trainer.device))[1]
                total, count = total + mean.item() * scored, count + scored
        model.train()
        return total / count


def train_nanogpt(job: SpeedrunJob, advance: Callable[[int], None]) -> SpeedrunRun:
    evaluations, evaluating, start = [], 0.0, time.perf_counter()
    with child_process("nanoGPT", NanoGPTSpeedrun, job) as call:
        call(None)
        loaded = time.perf_counter()
        while not evaluations or evaluations[-1].step < job.config.training.max_iters:
            evaluation, seconds = call("segment")
            evaluations.append(evaluation)
            evaluating += seconds
            advance(evaluation.step)
    return SpeedrunRun(evaluations, loaded - start, None, evaluating, time.perf_counter() - start, "float32")


def write_raw(files: Any, path: Path) -> None:
    """Writes token files as one file of 16-bit tokens without a header."""
    with open(path, "wb") as file:
        for start in range(0, len(files), 1 << 22):
            file.write(files.read(start, 1 << 22).astype(np.uint16).tobytes())


def split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the benchmark's flags with their values, and the arguments for train.py."""
    names = {field.name for field in dataclasses.fields(SpeedrunBench)}
    benchmark_args, train_args, is_ours = [], [], False
    for arg in args:
        if arg.startswith("--"):
            is_ours = arg[2:].split("=")[0].replace("-", "_") in names
        elif arg.endswith(".toml"):
            is_ours = False
        (benchmark_args if is_ours else train_args).append(arg)
    return benchmark_args, train_args


def read_arguments(args: list[str]) -> tuple[SpeedrunBench, list[str], Any]:
    """Returns the benchmark's settings, train.py's arguments and its `Config`."""
    benchmark_args, train_args = split_arguments(args)
    benchmark_args += [arg for arg in train_args if arg in HELP]
    settings = parse_flags(SpeedrunBench, __doc__, benchmark_args)
    train_args = with_config_file(train_args)
    if not config_files(train_args):
        example = command("tools/bench.py", "speedrun", "configs/quickstart.toml", "--target=1.7")
        raise UserError(f"name a config file: {example}")
    check_requirements(settings)

    from gpt_arc.training.command_line import read_command_line
    from gpt_arc.training.config import SETTINGS, RunConfig

    for arg in train_args:
        name = arg.removeprefix("--").split("=")[0].replace("-", "_")
        if arg.startswith("--") and (name in ("seed", "eval_iters") or SETTINGS.get(name, [None])[0] == "run"):
            hint = "; --seeds names the seeds" * (name == "seed")
            raise UserError(f"a speedrun is a new run, which sets {name} itself: leave --{name} out{hint}")
    config = read_command_line(train_args, None).config
    if config.run != RunConfig():
        raise UserError("a speedrun is a new run: leave the table [run] out of the config file")
    return settings, train_args, config


def check_nanogpt_reads(config: Any, corpus: Any, vocab_size: int) -> None:
    """Raises UserError for data that nanoGPT can't train on."""
    if len(corpus.names) > 1:
        raise UserError(f"nanoGPT trains on one dataset, but this is a mixture of {len(corpus.names)}: name --dataset")
    if vocab_size > 1 << 16:
        raise UserError(f"nanoGPT reads 16-bit tokens, but {corpus.names[0]} has {vocab_size} different ones")
    for name in ("train", "val"):
        corpus.split(name, config.model.block_size, vocab_size, document_mask=False)


def reached(evaluations: Sequence[Evaluation], target: float) -> Evaluation | None:
    """The first evaluation at or below the target."""
    return next((evaluation for evaluation in evaluations if evaluation.val_loss <= target), None)


def summarize(run: SpeedrunRun, seed: int, target: float) -> dict[str, Any]:
    """Figures of a run: the evaluations that first reached the target, was best and was last; None if missing."""
    first_reached = reached(run.evaluations, target)
    best = min(
        (e for e in run.evaluations if math.isfinite(e.val_loss)),
        key=lambda evaluation: evaluation.val_loss,
        default=None,
    )
    final = run.evaluations[-1] if run.evaluations else None
    named = {"reached": first_reached, "best": best, "end": final}
    row = {"seed": seed} | {name: evaluation and evaluation._asdict() for name, evaluation in named.items()}
    row |= {"start_up_seconds": run.start_up, "compilation_seconds": run.compilation}
    row |= {"evaluation_seconds": run.evaluation, "wall_seconds": run.wall, "dtype": run.dtype}
    return row | {"evaluations": [evaluation._asdict() for evaluation in run.evaluations]}


def ratio(ours: dict[str, Any], nanogpt: dict[str, Any]) -> dict[str, Any] | None:
    """Our seconds to the target over nanoGPT's; None if ours didn't reach it.

    If nanoGPT didn't reach it, its whole run counts and the ratio is an upper bound (`at_most`).
    """
    if ours["reached"] is None:
        return None
    seconds = (nanogpt["reached"] or nanogpt["end"])["seconds"]
    return {"seed": ours["seed"], "ratio": ours["reached"]["seconds"] / seconds, "at_most": nanogpt["reached"] is None}


def compute_floor(rows: list[dict[str, Any]], flops_per_token: int, rate: float | None) -> dict[str, Any] | None:
    """Medians over our runs that reached the target: the seconds that matrix products take, and their share of ours."""
    evaluations = [row["reached"] for row in rows if row["reached"]]
    if rate is None or not evaluations:
        return None
    seconds = [flops_per_token * evaluation["tokens"] / rate for evaluation in evaluations]
    share = median(floor / evaluation["seconds"] for floor, evaluation in zip(seconds, evaluations))
    rates = {"flops_per_token": flops_per_token, "flops_per_second": rate}
    return rates | {"seconds": median(seconds), "share": share}


def show(results: dict[str, Any]) -> None:
    target, columns = results["target"], ("steps", "tokens", "train s", "loss", "eval s", "compile s", "start s")
    print(f"\n{'':10}{'seed':>10}" + "".join(f"{column:>12}" for column in (*columns, "wall s")))
    for name, rows in results["programs"].items():
        for row in rows:
            hit, compilation = row["reached"], row["compilation_seconds"]
            cells = ["-"] * 4
            if hit:
                cells = [
                    f"{hit['step']:,}",
                    f"{hit['tokens']:,}",
                    f"{hit['seconds']:.2f}",
                    f"{hit['val_loss']:.4f}",
                ]
            times = row["evaluation_seconds"], compilation, row["start_up_seconds"], row["wall_seconds"]
            cells += ["-" if seconds is None else f"{seconds:.2f}" for seconds in times]
            print(f"{name:10}{row['seed']:>10}" + "".join(f"{cell:>12}" for cell in cells))
    print(f"\ntarget       {target:.4f}, " + results["target_is"])
    for name, rows in results["programs"].items():
        hits = [row["reached"]["seconds"] for row in rows if row["reached"]]
        if hits:
            share = f"{len(hits)} of {counted(len(rows), 'run')}"
            print(f"{name:12} takes {median(hits):.2f} s of training, the median of {share}")
        for row in rows:
            if row["reached"] is None:
                best = row["best"]
                ending = f"its best is {best['val_loss']:.4f} at step {best['step']:,}" if best else "it diverged"
                print(f"{'':12} {name}, seed {row['seed']}, does not reach {target:.4f}: {ending}")
    for row in results["programs"].get("nanoGPT", []):
        end = row["end"]
        print(f"{'':12} nanoGPT, seed {row['seed']}, ends at {end['val_loss']:.4f} after {end['seconds']:.2f} s")
    times = [row["compilation_seconds"] for row in results["programs"]["ours"]]
    compiled = [seconds for seconds in times if seconds is not None]
    partly = f", in {len(compiled)} of {counted(len(times), 'run')}" * (len(compiled) < len(times))
    shown = f"ours was, in {median(compiled):.1f} s that don't count{partly}" if compiled else "ours was not"
    print(f"compiled     {shown}")
    if results["ratios"]:
        each = ", ".join(
            f"{'at most ' * row['at_most']}{row['ratio']:.3f} with seed {row['seed']}" for row in results["ratios"]
        )
        middle = results["ratio"]["median"]
        print(f"ratio        ours takes {middle:.3f} of nanoGPT's seconds, {1 / middle:.2f} times as fast: {each}")
    if results["floor"]:
        floor = results["floor"]
        rate = f"{floor['flops_per_second'] / 1e9:,.0f} GFLOP/s of {results['programs']['ours'][0]['dtype']} products"
        print(f"floor        {floor['seconds']:.2f} s at {rate}; it is {floor['share']:.0%} of ours")


@contextlib.contextmanager
def progress_bar(name: str, seed: int, steps: int) -> Iterator[Callable[[int], Any]]:
    """Shows a progress bar on a terminal; yields the function that sets the number of steps done."""
    from tqdm import tqdm

    with tqdm(total=steps, desc=f"{name}, seed {seed}", unit="step", leave=False, disable=None) as bar:
        yield lambda step: bar.update(step - bar.n)


def print_end(name: str, seed: int, run: SpeedrunRun) -> None:
    final = run.evaluations[-1] if run.evaluations else None
    ending = f"{final.val_loss:.4f} after {final.seconds:.2f} s of training" if final else "diverged"
    print(f"{name:12} seed {seed} ends: {ending}", flush=True)


def bench_speedrun(args: list[str]) -> int:
    """Returns the exit code: 1 if a run of ours doesn't reach the target."""
    settings, for_train, config = read_arguments(args)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, signal.default_int_handler)  # only this process acts on a closed terminal

    from gpt_arc.data.datasets import open_corpus, prepare_missing
    from gpt_arc.device import device_name, resolve_device
    from gpt_arc.nn.meta import meta_device
    from gpt_arc.planning.cost import describe_parameters, flops_per_token, peak_flops
    from model import GPT

    device = resolve_device(config.training.device)
    prepare_missing(config.data.sources)
    corpus = open_corpus(config.data.sources)
    assert corpus is not None  # it has just been prepared
    vocab_size = corpus.tokenizer.vocab_size if corpus.tokenizer else config.model.vocab_size
    corpus.split("val", config.model.block_size, vocab_size, config.data.document_mask)
    with meta_device():
        sketch = GPT(dataclasses.replace(config.model, vocab_size=vocab_size))
    if settings.nanogpt is not None:
        check_nanogpt_reads(nanogpt_recipe(vocab_size, 0), corpus, vocab_size)
    machine = machine_name(device)
    print(f"machine      {machine}")
    print(f"model        {describe_parameters(sketch, ' parameters')}, {counted(config.training.max_iters, 'step')}")
    print(f"data         {', '.join(corpus.names)}, {vocab_size} different tokens", flush=True)

    runs: dict[int, dict[str, SpeedrunRun]] = {}  # by seed and program
    rates, interrupted = [], None
    with tempfile.TemporaryDirectory(prefix="gpt-arc-bench-") as name:
        if settings.nanogpt is not None:
            write_raw(corpus.split("train", 1, vocab_size, document_mask=False), Path(name) / TRAIN_FILE)
        try:
            for seed in settings.seeds:
                runs_of_seed: dict[str, SpeedrunRun] = {}
                if settings.nanogpt is not None:
                    recipe = nanogpt_recipe(vocab_size, seed)
                    job = SpeedrunJob(
                        settings.nanogpt.resolve(), recipe, str(device), corpus.directories[0], Path(name)
                    )
                    with progress_bar("nanoGPT", seed, recipe.training.max_iters) as advance:
                        runs_of_seed["nanoGPT"] = train_nanogpt(job, advance)
                    print_end("nanoGPT", seed, runs_of_seed["nanoGPT"])
                with progress_bar("ours", seed, config.training.max_iters) as advance:
                    runs_of_seed["ours"] = train_ours(for_train, seed, advance)
                print_end("ours", seed, runs_of_seed["ours"])
                rates.append(peak_flops(device, device_name(device), runs_of_seed["ours"].dtype))
                runs[seed] = runs_of_seed
        except KeyboardInterrupt:
            if not runs:
                raise
            interrupted = KeyboardInterrupt(f"interrupted after {len(runs)} of {counted(len(settings.seeds), 'seed')}")

    target, target_is = settings.target, "as given"
    if target in (None, "nanogpt"):
        target = median(runs_of_seed["nanoGPT"].evaluations[-1].val_loss for runs_of_seed in runs.values())
        target_is = "where nanoGPT ends" + ", the median" * (len(runs) > 1)
    results: dict[str, Any] = {"machine": machine, "settings": json_settings(settings), "config": asdict(config)}
    results |= {"arguments": for_train, "target": target, "target_is": target_is}
    results["programs"] = programs = {
        name: [summarize(runs_of_seed[name], seed, target) for seed, runs_of_seed in runs.items()]
        for name in ("ours",) + ("nanoGPT",) * (settings.nanogpt is not None)
    }
    ratios = [ratio(ours, nanogpt) for ours, nanogpt in zip(programs["ours"], programs.get("nanoGPT", []))]
    results["ratios"] = ratios = [row for row in ratios if row is not None]
    results["ratio"] = spread([row["ratio"] for row in ratios]) if ratios else None
    flops = flops_per_token(sketch)
    results["floor"] = compute_floor(programs["ours"], flops, None if rates[0] is None else median(rates))
    show(results)
    write_results(settings.json, results)
    if interrupted:
        raise interrupted
    return int(not all(row["reached"] for row in programs["ours"]))
