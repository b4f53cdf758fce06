"""Scaling laws: train a config at several sizes and budgets, fit laws to the losses, and plan or predict a larger run.

    python stages/scaling.py sweep configs/sweeps/scaling_mini.toml         trains into out/scaling_mini/
    python stages/scaling.py sweep mine.toml --commands                     prints the commands, to run them elsewhere
    python stages/scaling.py fit out/scaling_mini                           laws, intervals, pictures
    python stages/scaling.py plan --accelerator=h100 --devices=8 --days=2 --price=2.5
    python stages/scaling.py plan --flops=1e21 --law=hoffmann --output=planned.toml
    python stages/scaling.py predict out/scaling_mini large.toml
    python stages/scaling.py compare configs/gpt2.toml configs/moe.toml
    python stages/scaling.py claim --total=1.8e12 --active=220e9 --experts=8 --experts_per_token=2

`python stages/scaling.py ACTION --help` describes each. A sweep repeats no run that is done, and resumes one that was
killed.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


# Modules that need torch are imported in functions, so that wrong settings are refused at once.

import datetime
import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import HELP, command, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.planning import pictures
from gpt_arc.planning.fits import FinishedRun, Laws, best_of_rates, best_rate, by_rate, fit_laws, size_of
from gpt_arc.planning.scaling_laws import CHINCHILLA, PUBLISHED, Law, fit, kaplan_optimum, optimum
from gpt_arc.reading import read_json, reading
from gpt_arc.settings import STRICT, Count, Natural, Positional, Positive, PositiveShare
from gpt_arc.tables import amount, counted, human, table, to_json
from gpt_arc.training.arguments import config_file
from gpt_arc.training.config import build_config, read_settings, write_settings

if TYPE_CHECKING:
    from gpt_arc.training.signals import StopSignal
    from gpt_arc.training.sweeps import SweepRun

CHINCHILLAS = "L(N, D), Chinchilla's form"


SWEEP = command("stages/scaling.py", "sweep", "FILE.toml")
REFUSED = 2  # the exit code for a mistake, which the other runs of a sweep most likely share


@dataclass(frozen=True, config=STRICT)
class SweepOptions:
    file: Positional[Path]
    """The sweep: a config of train.py with a table [sweep]."""
    jobs: Count = 1
    """Runs at a time."""
    commands: bool = False
    """Print the commands of the runs that are left instead of running them."""
    launcher: str = "python"
    """What starts train.py, such as "torchrun --standalone --nproc_per_node=8", for runs after one another."""


def sweep(options: SweepOptions) -> int:
    from gpt_arc.training.runs import Lock
    from gpt_arc.training.signals import StopSignal
    from gpt_arc.training.sweeps import sweep_runs, write_table

    runs = sweep_runs(options.file)
    left = [run for run in runs if not run.finished]
    if options.commands:
        for run in left:
            print(shlex.join(run.command(options.launcher)))
        return 0
    tokens, flops = sum(run.tokens for run in left), sum(run.flops for run in left)
    print(f"{counted(len(runs), 'run')}, {len(left)} left: {amount(tokens)} tokens, {human(flops, 'FLOP')}", flush=True)
    stop, codes, folder = StopSignal(), [], runs[0].folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)  # noqa: F841  until the process ends

    def next_run(run: "SweepRun") -> None:
        if not stop.received and REFUSED not in codes:
            codes.append(train(run, options, stop))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(next_run, left))
    results, path = [run.result() for run in runs if run.finished], folder / "results.json"
    if results:
        write_file(path, write_table(results))
    if stop.received:
        print("stopped, what has begun is saved; the same command goes on")
        return 128 + stop.received
    again = command("stages/scaling.py", "fit", folder)
    fit_them = f"; fit laws to them with: {again}" if results else ""
    print(f"{folder}: {counted(len(results), 'result')} of {len(runs)}{fit_them}")
    if REFUSED in codes:
        raise UserError("train.py refuses the run that ended with exit code 2: mend this, then repeat the command")
    return max(codes, default=0)


def train(run: "SweepRun", options: SweepOptions, stop: "StopSignal") -> int:
    """Trains one run; its output goes to a log beside its folder. Returns the exit code."""
    log = run.folder.with_name(run.name + ".log")
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if options.jobs > 1 else {})
    arguments = run.command(options.launcher)
    with open(log, "ab") as file:
        # a session of its own, or a terminal's Ctrl-C would reach it beside the signal that is passed on
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env=environment, start_new_session=True)
    passed_on = False
    while process.poll() is None:
        if stop.received and not passed_on:
            passed_on = True
            process.send_signal(stop.received)
        time.sleep(0.1)
    code = process.returncode
    if run.finished:
        end = f"val loss {run.result().val_loss:.4f}"
    else:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()] or ["no output"]
        reasons = [line for line in lines if line.startswith("train.py: ")]  # another process may write here too
        end = f"ended with exit code {code}: {(reasons or lines)[-1]} ({log})"
    print(f"{run.name}: {run.parameters:,} parameters, {run.tokens:,} tokens: {end}", flush=True)
    return code


@dataclass(frozen=True, config=STRICT)
class FitOptions:
    results: Positional[Path]
    """The folder of a sweep, out/NAME, or its results.json."""
    embeddings: bool = False
    """Count embeddings and head as parameters, as Chinchilla does. False: leave them out, as Kaplan does."""
    min_tokens: Natural = 0
    """Leave out runs of fewer tokens: losses of the first steps of training follow no power law."""
    resamplings: Natural = 200
    """Fits to resampled runs, for the intervals."""
    seed: Natural = 0
    """Of the resampling."""
    pictures: bool = True
    """Draw PNG and SVG pictures beside the results."""


def read_results(path: Path, min_tokens: int) -> tuple[list[FinishedRun], Path]:
    """The results of a sweep, without runs of fewer tokens, and their file. Raises UserError."""
    file = path / "results.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"there is no {file}: train with: {SWEEP}")
    results = [result for result in read_json(file, list[FinishedRun]) if result.tokens >= min_tokens]
    if not results:
        least = f" of {min_tokens:,} tokens or more" if min_tokens else ""
        raise UserError(f"{file} has no results{least}: train with: {SWEEP}")
    return results, file


def show_rates(results: list[FinishedRun]) -> None:
    """Prints the losses by learning rate of the shapes and tokens that were trained with three rates or more."""
    for run, losses in by_rate(results):
        best = best_rate([*losses], [*losses.values()])
        at = "at the end of the rates: add rates on that side" if best is None else f"{best:.2g}"
        print(f"{run.n_layer}x{run.n_embd}, {amount(run.tokens)} tokens: best learning rate {at}")
        print(table([["rate", "val loss"], *([f"{rate:.3g}", f"{loss:.4f}"] for rate, loss in losses.items())]))


def fit_results(options: FitOptions) -> int:
    results, file = read_results(options.results, options.min_tokens)
    path = file.with_name("laws.json")
    if (other := fitted_results(path) or file.name) != file.name:
        raise UserError(f"{path} has the laws of {other}: move {file.name} to a folder of its own, or delete {path}")
    show_rates(results)
    laws = fit_laws(best_of_rates(results), options.embeddings, options.resamplings, options.seed)
    show(laws)
    write_file(path, to_json({"results": file.name} | laws.figures()) + "\n")
    written = [path]
    if options.pictures:
        written += pictures.draw_all(results, laws, file.parent)
    print(f"wrote {', '.join(path.name for path in written)} to {file.parent}")
    return 0


def fitted_results(laws: Path) -> str | None:
    """The name of the results that laws.json was fitted to; None if there is none, or if it is damaged or older."""
    try:
        figures = read_json(laws) if laws.exists() else {}
    except UserError:
        return None
    return figures.get("results") if isinstance(figures, dict) else None


def show(laws: Laws) -> None:
    noun = "with" if laws.embeddings else "without"
    print(f"{counted(laws.runs, 'run')}; N counts parameters {noun} embeddings and head; intervals of 95%\n")
    for name, each in laws.fits.items():
        error = (each.residuals**2).mean() ** 0.5
        print(f"{name}, source {each.law.source}, error {error:.2%}")
        for constant, value in each.law.constants.items():
            low, high = each.intervals[constant] if each.draws else (float("nan"),) * 2
            print(f"  {constant:<10} {value:<12.5g} {low:.4g} to {high:.4g}")
    for name, each in laws.trends.items():
        print(f"best N by {name}: {each.factor:.4g} C^{each.exponent:.3f}, so D as C^{1 - each.exponent:.3f}")
    for name, reason in laws.missing.items():
        print(f"not fitted: {name}: {reason}")


@dataclass(frozen=True, config=STRICT)
class PlanOptions:
    flops: Positive | None = None
    """The budget. None: what the devices do in `days`."""
    accelerator: str = "h100"
    """The kind of device: h100, a100, h200, rtx 4090 ..."""
    devices: Count = 1
    """Number of devices."""
    days: Positive | None = None
    """Days of training, in place of flops."""
    mfu: PositiveShare = 0.4
    """Share of the devices' peak that training reaches."""
    price: Positive | None = None
    """Price of a device's hour, in any currency."""
    law: str = "besiroglu"
    """hoffmann, besiroglu or kaplan; or the folder of a sweep that was fitted, for its law and intervals."""
    config: str = "modern"
    """The config whose architecture and settings the plan takes, at another size."""
    aspect_ratio: Annotated[float, Gt(0), Le(10_000)] = 64.0
    """Width for each layer."""
    head_width: Annotated[int, Ge(1), Le(10_000)] = 64
    """Width of a head."""
    output: Path | None = None
    """The config file to write. None: none."""


def plan(options: PlanOptions) -> int:
    from gpt_arc.nn.meta import meta_device
    from gpt_arc.planning.budget import Hardware, gpt3_batch, gpt3_rate, nearest_shape
    from gpt_arc.planning.cost import flops_per_token, memory_estimate
    from model import GPT

    if (options.flops is None) == (options.days is None):
        raise UserError("name a budget: either --flops, or --days with --accelerator and --devices")
    hardware = Hardware(options.accelerator, options.devices, options.mfu, options.price)
    flops = options.flops or hardware.flops_per_second * 86_400 * (options.days or 0)
    law, draws, embeddings = law_named(options.law)
    best = kaplan_optimum(flops) if options.law == "kaplan" else optimum(law.constants, flops)
    source = config_file(options.config)
    settings = read_settings(Path(source))
    base = build_config(settings, source)
    model = nearest_shape(base.model, best.n, options.aspect_ratio, options.head_width, embeddings)
    with meta_device():
        gpt = GPT(model)
    n = gpt.num_parameters(embeddings, active=True)
    d = flops / flops_per_token(gpt)
    rate = gpt3_rate(n)
    batch = max(1, round(gpt3_batch(n) / (base.data.batch_size * model.block_size)))
    per_step = batch * base.data.batch_size * model.block_size
    steps = round(d / per_step)
    if not steps:
        raise UserError(
            f"{flops:.3g} FLOPs are less than a step of the smallest model that {options.config} allows, "
            f"{flops_per_token(gpt) * per_step:.3g}: name a larger budget"
        )
    noun = "parameters" if embeddings else "parameters without embeddings and head"
    print(f"budget         {flops:.4g} FLOPs: {hardware.cost(flops)}")
    print(f"law            {options.law} ({law.source})")
    print(
        f"optimum        {amount(best.n)} {noun}, {amount(best.d)} tokens, {best.tokens_per_parameter:.3g} a parameter"
    )
    print(f"model          {model.n_layer} layers of width {model.n_embd}, {model.n_head} heads: {n:,} {noun}")
    print(f"tokens         {amount(steps * per_step)}, {steps:,} steps of {per_step:,}; learning rate {rate:.2g}")
    print(f"predicted loss {predicted(law, draws, n, steps * per_step)}")
    memory = memory_estimate(gpt, base.data.batch_size, "bfloat16", "cuda")
    print(f"memory         {human(memory, 'B')} on one device with a micro-batch of {base.data.batch_size}")
    if options.output:
        if options.output.exists():
            raise UserError(f"{options.output} exists: name another file for --output, or delete it")
        kept = {
            name: value for name, value in settings.items() if name not in ("gradient_accumulation_steps", "min_lr")
        }
        shape = {name: getattr(model, name) for name in ("n_layer", "n_head", "n_embd", "n_kv_head", "mlp_size")}
        chosen = {"learning_rate": rate, "min_lr": rate / 10, "max_iters": steps, "tokens_per_step": per_step}
        write_file(options.output, write_settings(kept | shape | chosen))
        print(f"wrote {options.output}; train with: {command('train.py', options.output, '--dataset=NAME')}")
    return 0


def law_named(name: str) -> tuple[Law, list[Law], bool]:
    """A published law, or that of a fitted sweep with its resamplings; and whether its N counts embeddings."""
    if name in ("hoffmann", "besiroglu", "kaplan"):
        return PUBLISHED[name], [], name != "kaplan"
    file = Path(name) / "laws.json"
    if not file.exists():
        raise UserError(f"law = {name} is none of hoffmann, besiroglu and kaplan, and there is no {file}")
    figures = read_json(file)
    with reading(file, f"fit again with: {command('stages/scaling.py', 'fit', name)}"):
        if CHINCHILLAS not in figures["laws"]:
            raise UserError(f"{file} has no fit of {CHINCHILLAS}: {figures['missing'][CHINCHILLAS]}")
        record = figures["laws"][CHINCHILLAS]
        constants = {constant: float(record["constants"][constant]) for constant in CHINCHILLA.constants}
        draws = [Law(CHINCHILLA, dict(zip(CHINCHILLA.constants, values, strict=True))) for values in record["draws"]]
        return Law(CHINCHILLA, constants, str(file)), draws, bool(figures["embeddings"])


def predicted(law: Law, draws: list[Law], n: float, d: float) -> str:
    loss = f"{float(law.loss(n=n, d=d)):.3f} nats a token"
    if not draws:
        return loss
    low, high = interval(draws, n, d)
    return f"{loss}, 95% interval {low:.3f} to {high:.3f}"


def interval(draws: list[Law], n: float, d: float) -> tuple[float, float]:
    losses = sorted(float(law.loss(n=n, d=d)) for law in draws)
    return losses[int(0.025 * len(losses))], losses[int(0.975 * (len(losses) - 1))]


@dataclass(frozen=True, config=STRICT)
class PredictOptions:
    results: Positional[Path]
    """The folder of a sweep, or its results.json."""
    target: Positional[Path]
    """A sweep's file with the run or runs to predict."""
    embeddings: bool = False
    """Count embeddings and head as parameters."""
    min_tokens: Natural = 0
    """Leave out runs of fewer tokens."""
    share: PositiveShare = 0.01
    """Share of the predicted run's compute that the runs which predict it may have, at most."""
    resamplings: Count = 1000
    """Fits to resampled runs, for the interval."""


def predict(options: PredictOptions) -> int:
    """Writes down a run's loss before it is trained, and how far it was missed once it is."""
    from gpt_arc.training.sweeps import sweep_runs

    results, file = read_results(options.results, options.min_tokens)
    for run in sweep_runs(options.target):
        path = run.folder.with_name(run.name + ".prediction.json")
        if path.exists():
            compare_with_prediction(run, read_json(path), path)
            continue
        if run.step:
            raise UserError(f"{run.folder} has begun to train: a prediction comes before it")
        used = [result for result in best_of_rates(results) if result.flops <= options.share * run.flops]
        n = run.parameters if options.embeddings else run.parameters_without_embeddings
        sizes = [size_of(result, options.embeddings) for result in used]
        try:
            law = fit(
                CHINCHILLA,
                {"n": sizes, "d": [result.tokens for result in used]},
                [result.val_loss for result in used],
                options.resamplings,
            )
        except ValueError as error:
            known = f"{file} has {counted(len(used), 'run')} of at most {options.share:.0%} of {run.name}'s compute"
            raise UserError(f"{known}: {error}; --share allows runs of more compute") from None
        low, high = law.next_run(lambda law, n=n, d=run.tokens: float(law.loss(n=n, d=d)))
        prediction = {
            "run": run.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "results": hashlib.sha256(file.read_bytes()).hexdigest(),
            "runs": len(used),
            "largest_share": max(result.flops for result in used) / run.flops,
            "constants": law.law.constants,
            "val_loss": float(law.law.loss(n=n, d=run.tokens)),
            "interval": [low, high],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, to_json(prediction, indent=1) + "\n")
        source = f"{counted(len(used), 'run')} of at most {prediction['largest_share']:.2%} of its compute"
        print(f"{run.name}: val loss {prediction['val_loss']:.4f}, 95% interval {low:.4f} to {high:.4f}, from {source}")
        print(f"written to {path}; train it with: {command('stages/scaling.py', 'sweep', options.target)}")
    return 0


def compare_with_prediction(run: "SweepRun", prediction: dict[str, Any], path: Path) -> None:
    said = f"{run.name}: predicted {prediction['val_loss']:.4f} on {prediction['date']} ({path})"
    if not run.finished:
        print(f"{said}; not trained yet")
        return
    actual, (low, high) = run.result().val_loss, prediction["interval"]
    miss, where = actual / prediction["val_loss"] - 1, "in" if low <= actual <= high else "outside"
    print(f"{said}; trained to {actual:.4f}: missed by {miss:+.2%}, {where} the interval {low:.4f} to {high:.4f}")


@dataclass(frozen=True, config=STRICT)
class CompareOptions:
    configs: Positional[tuple[str, ...]]
    """Two config files or more, or names of configs that come with gpt-arc."""
    sequences: Count = 1
    """Full contexts that serving keeps keys and values of."""


def compare(options: CompareOptions) -> int:
    from gpt_arc.nn.meta import meta_device
    from gpt_arc.planning.budget import serving_memory
    from gpt_arc.planning.cost import flops_per_token
    from model import GPT

    rows: list[list[Any]] = [
        ["", *map(str, options.configs)],
        *([name] for name in ("parameters", "active", "without embeddings", "FLOPs a token", "weights", "cache")),
    ]
    for name in options.configs:
        source = config_file(name)
        with meta_device():
            model = GPT(build_config(read_settings(Path(source)), source).model)
        serving = serving_memory(model, options.sequences)
        column = [f"{model.num_parameters():,}", f"{model.num_parameters(active=True):,}"]
        column += [f"{model.num_parameters(embeddings=False):,}", human(flops_per_token(model))]
        column += [human(serving["weights"], "B"), human(serving["keys and values"], "B")]
        for row, value in zip(rows[1:], column):
            row.append(value)
    print(table(rows))
    print("\nweights and cache: bytes that serving keeps in 16 bits; all of a mixture's experts are among the weights")
    return 0


@dataclass(frozen=True, config=STRICT)
class ClaimOptions:
    total: Positive
    """Parameters in all."""
    active: Positive
    """Parameters that a token uses."""
    experts: Count = 8
    """Experts of equal size."""
    experts_per_token: Count = 2
    """Experts that a token uses."""


def claim(options: ClaimOptions) -> int:
    """Whether a mixture of equal experts can have the parameters that are claimed for it."""
    from gpt_arc.planning.budget import MixtureClaim

    if options.experts_per_token >= options.experts:
        raise UserError("experts_per_token must be less than experts")
    if options.active > options.total:
        raise UserError(f"active = {options.active:g} must be at most total = {options.total:g}")
    mixture = MixtureClaim(options.total, options.active, options.experts, options.experts_per_token)
    print(f"expert         {amount(mixture.expert)} parameters, over all layers")
    if mixture.shared < 0:
        print(
            f"impossible: what all tokens share would have -{amount(-mixture.shared)} parameters; with "
            f"{options.experts} equal experts, {options.experts_per_token} a token, a model of {amount(options.total)} "
            f"has at least {amount(mixture.least_active)} active"
        )
        return 1
    print(f"shared         {amount(mixture.shared)} parameters")
    return 0


ACTIONS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "sweep": (SweepOptions, sweep),
    "fit": (FitOptions, fit_results),
    "plan": (PlanOptions, plan),
    "predict": (PredictOptions, predict),
    "compare": (CompareOptions, compare),
    "claim": (ClaimOptions, claim),
}


def main() -> int:
    action, *args = sys.argv[1:] or [""]
    if action in HELP:
        print(__doc__)
        return 0
    if action not in ACTIONS:
        raise UserError(f"name what to do: {command('stages/scaling.py')} {', '.join(ACTIONS)}")
    options, perform = ACTIONS[action]
    return perform(parse_flags(options, __doc__, args))


if __name__ == "__main__":
    entry_point(main)()
