"""What a run logs: means between lines, metrics.jsonl, and the same for Weights & Biases, TensorBoard or Trackio."""

import contextlib
import json
import math
import secrets
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from gpt_arc.distributed import IS_MAIN, say
from gpt_arc.errors import UserError, first_line
from gpt_arc.extras import import_extra
from gpt_arc.files import write_file
from gpt_arc.reading import open_plain, read_bytes, reading
from gpt_arc.tables import counted, duration, to_json

if TYPE_CHECKING:
    from gpt_arc.training.config import LoggingConfig
    from gpt_arc.training.options import StageOptions

METRICS = {  # the keys of metrics.jsonl: the same name for the same thing in train.py and in every stage
    "step": "updates so far; of stages/ppo.py, iterations",
    "epoch": "epochs so far, in the line that ends one",
    "train_loss": "mean since the line before it; in a line of stages/finetune.py with epoch, over that epoch",
    "val_loss": "of the val split",
    "next_sentence_loss": "mean since the line before it, in nats a pair: is the second text what follows the first?",
    "next_sentence_accuracy": "share of these pairs that are told right",
    "val_next_sentence_loss": "of the val split's pairs",
    "val_next_sentence_accuracy": "share of the val split's pairs that are told right",
    "learning_rate": "of the last update",
    "grad_norm": "norm of the last update's gradient before it is clipped",
    "tokens": "tokens read so far; each is predicted, or with objective = masked a share of them",
    "tokens_per_second": "since the line before it",
    "seconds": "of training so far, without evaluations and checkpoints",
    "mfu": "share of the device's peak rate",
    "skipped": "updates skipped because their loss or gradient was not finite",
    "rewinds": "returns to a checkpoint after a spike of the loss",
    # mixtures of experts
    "expert_cv": "standard deviation of the experts' load over its mean",
    "expert_max": "largest load of an expert over the mean",
    "router_entropy": "mean entropy of the routers' distributions, in nats",
    "dropped": "share of the tokens' choices that found no room in an expert",
    # classifiers, reward models and DPO
    "accuracy": "share of the update's pairs that are ranked right",
    "margin": "mean difference of rewards between the better and the worse response",
    "language_loss": "of the texts, in nats a token",
    "examples_per_second": "over an epoch",
    "val_accuracy": "share of the val split's labels or pairs, or of whole targets, that are right",
    "val_calibration_error": "mean distance between predicted and actual agreement",
    "val_macro_f1": "mean F1 over the classes",
    "val_matthews": "Matthews' correlation",
    "val_mean_squared_error": "of numbers",
    "val_pearson": "Pearson's correlation",
    "val_spearman": "Spearman's correlation",
    "val_language_loss": "of the val split's texts, in nats a token",
    # PPO: means over an iteration's responses, tokens or updates
    "episodes": "responses so far",
    "score": "reward of a response without the KL penalty",
    "score_std": "standard deviation of the scores",
    "monitored": "reward that is not learned from",
    "reward": "score less the KL penalty",
    "kl_k1": "KL to the reference of a response, in nats: log-ratio",
    "kl_k3": "the same by the estimator of lower variance",
    "kl_coef": "coefficient of the KL penalty",
    "entropy": "of the policy's distributions, in nats",
    "response_tokens": "tokens of a response",
    "ended": "share of the responses with an end token",
    "explained_variance": "share of the returns' variance that the values explain",
    "policy_loss": "clipped objective, negated",
    "value_loss": "half the clipped squared error",
    "clip_fraction": "share of the ratios that are clipped",
    "value_clip_fraction": "share of the values that are clipped",
    "pretraining_loss": "of the pre-training text, in nats a token",
    "rollout_seconds": "of writing and scoring the responses",
    "iteration_seconds": "of the whole iteration",
}


class Meter:
    """Mean loss and rate since the last `take`."""

    loss_sum, tokens, seconds = 0.0, 0, 0.0

    def add(self, loss_sum: float, tokens: int, seconds: float) -> None:
        self.loss_sum += loss_sum
        self.tokens += tokens
        self.seconds += seconds

    def take(self) -> tuple[float, float] | tuple[None, None]:
        """Returns the mean loss in nats a token and the tokens a second, None without any, and resets both."""
        loss_sum, tokens, seconds = self.loss_sum, self.tokens, self.seconds
        self.loss_sum, self.tokens, self.seconds = 0.0, 0, 0.0
        return (loss_sum / tokens, tokens / seconds) if tokens else (None, None)


class Utilization:
    """Model FLOPs utilization: the share of the devices' peak rate that a run reaches.

    A CPU's peak is measured, and too low if other processes were busy meanwhile. Where the share is higher than
    training ever reaches, it is measured again, a few times in all.
    """

    HIGHEST, AGAIN = 0.9, 5

    def __init__(self, measure: Callable[[], float | None], flops_per_token: float, processes: int):
        """`measure` returns a device's peak in FLOPs per second; None if it is unknown."""
        self._measure, self._peak = measure, measure()
        self._flops, self._again = flops_per_token / processes, self.AGAIN

    def at(self, rate: float | None) -> float | None:
        """Returns the utilization at `rate` tokens per second; None if it is unknown."""
        if not (rate and self._peak):
            return None
        if self._flops * rate > self.HIGHEST * self._peak and self._again:
            self._again -= 1
            self._peak = max(self._peak, self._measure() or 0.0)
        return self._flops * rate / self._peak


class MetricsLog:
    """metrics.jsonl: one JSON object per line, in the order of steps. A tracker, if there is one, gets the same."""

    def __init__(self, directory: Path, keep_until: int, tracker: "Tracker | None" = None):
        """Append to the run's file, after dropping what a killed run logged beyond step `keep_until`."""
        self.path, self._tracker = directory / "metrics.jsonl", tracker
        self._unwritten = b""
        self._warned = False
        self._open(keep_until)

    def _open(self, keep_until: int) -> None:
        kept = [line for line in read_metrics(self.path) if line["step"] <= keep_until]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Drops the lines beyond `step`, unless the disk doesn't let it."""
        with contextlib.suppress(OSError):
            self._file.close()
            self._open(step)

    def write(self, line: dict[str, Any]) -> None:
        """Write a line, without what is None or not finite: JSON has no such numbers.

        If the disk is full, lines are kept until there is room: a log doesn't end a run.
        """
        line = {key: v for key, v in line.items() if v is not None and (not isinstance(v, float) or math.isfinite(v))}
        self._unwritten += (to_json(line) + "\n").encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                say(f"{self.path} can't be written ({error.strerror}): training goes on, later lines are tried again")
            self._warned = True
        self._track("log", line, step=line["step"])

    def write_sample(self, step: int, text: str) -> None:
        """Append a text by the model to samples.txt; a full disk doesn't end the run."""
        path = self.path.with_name("samples.txt")
        if path.is_file() or not path.exists():  # nobody may read from a pipe
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
                file.write(f"--- step {step}\n{text}\n\n")
        self._track("log", {"sample": text}, step=step)

    def close(self) -> None:
        self._file.close()
        self._track("finish")

    def _track(self, method: str, *args: Any, **settings: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker.run, method)(*args, **settings)
        except Exception as error:  # whatever kind it is, a log doesn't end a run
            say(f"{self._tracker.title}: {first_line(error)}; the run goes on without it")
            self._tracker = None


class ProgressBar(tqdm):
    """Shows how far a run has come: on a terminal a bar, elsewhere lines, and neither if it is `quiet`."""

    def __init__(self, total: int, done: int, unit: str, quiet: bool):
        bar = "{percentage:3.0f}%|{bar}| {unit} {n_fmt}/{total_fmt}{postfix}, {remaining} left"
        hidden = quiet or not IS_MAIN
        super().__init__(
            total=total, initial=done, unit=unit, bar_format=bar, dynamic_ncols=True, disable=hidden or None
        )
        self.writes_lines = bool(self.disable) and not quiet
        self._val_loss = ""

    def set_figures(self, shown: str, line: Mapping[str, Any]) -> None:
        """Put `shown` beside the bar, with the last val loss and the rate from lines of metrics."""
        if line.get("val_loss") is not None:
            self._val_loss = f"val {line['val_loss']:.4f}"
        rate = f"{line['tokens_per_second']:,.0f} tokens/s" if line.get("tokens_per_second") else ""
        val_loss = "" if "val " in shown else self._val_loss
        self.set_postfix_str(", ".join(filter(None, (shown, val_loss, rate))))

    def show(self, line: Mapping[str, Any]) -> None:
        """Show a line of train.py beside the bar and, after an evaluation or without a bar, by itself."""
        line = {name: value for name, value in line.items() if value is not None}
        losses = {"loss": "train_loss", "val": "val_loss", "next sentences right": "val_next_sentence_accuracy"}
        shown = ", ".join(f"{name} {line[key]:.4f}" for name, key in losses.items() if key in line)
        self.set_figures(shown, line)
        if self.writes_lines or "val_loss" in line and not self.disable:
            rate = f", rate {line['learning_rate']:.2e}" if "learning_rate" in line else ""
            speed = f", {line['tokens_per_second']:,.0f} tokens/s" if line.get("tokens_per_second") else ""
            say(f"step {line['step']}: {shown}{rate}{speed}")


def trained(seconds: float, tokens: float | None) -> str:
    """Returns a line with how long a run trained, over all its starts, and on how many tokens if that is known."""
    figures = [duration(seconds)]
    if tokens and seconds:
        figures += [counted(tokens, "token"), f"{tokens / seconds:,.0f} tokens/s"]
    return f"trained        {', '.join(figures)}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, by present names, without lines and values that are cut short or damaged."""
    if not path.exists():
        return []
    lines = []
    with reading(path), open_plain(path) as file:
        text = file.read().decode(errors="replace")
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    lines = [{name: v for name, v in line.items() if _is_number(v)} for line in lines if isinstance(line, dict)]
    return with_present_names([line for line in lines if type(line.get("step")) is int])


def _is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number that fits a float."""
    return type(value) in (int, float) and abs(value) < 1e300


def with_present_names(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a run's lines with the names of METRICS for those of older versions.

    The stages wrote loss or task_loss, sft.py the tokens of each update, and ppo.py an iteration's seconds as seconds.
    """
    tokens, present = 0, []
    for line in lines:
        names = {"loss": "train_loss", "task_loss": "train_loss"}
        if "rollout_seconds" in line and "iteration_seconds" not in line:
            names["seconds"] = "iteration_seconds"
        if "loss" in line and type(line.get("tokens")) is int:
            tokens += line["tokens"]
            line = line | {"tokens": tokens}
        present.append({names.get(name, name): value for name, value in line.items()})
    return present


def movement(losses: Sequence[float]) -> int:
    """Returns -1 if a loss falls from the first third of `losses` to the last, 1 if it rises, and 0 for neither.

    A change counts from a hundredth of the loss on, and from two standard errors of the difference.
    """
    count = len(losses) // 3
    first, last = losses[:count], losses[-count:]
    before, after = statistics.mean(first), statistics.mean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / count)
    if abs(after - before) <= max(0.01 * abs(before), 2 * error):
        return 0
    return -1 if after < before else 1


class Tracker(NamedTuple):
    """A run of a service or program that draws metrics; `run` has wandb's methods log and finish."""

    title: str
    run: Any


def start_tracker(
    folder: Path, step: int, settings: "LoggingConfig | StageOptions", config: dict[str, Any]
) -> Tracker | None:
    """Starts the tracker that the settings name, if any; a resumed run, at `step`, continues the one it started with.

    Raises UserError, after removing what a new run left.
    """
    kind = settings.logger or "none"
    if settings.wandb_log and kind not in ("none", "wandb"):
        raise UserError(f"wandb_log = true contradicts logger = {kind}: --wandb_log=False leaves the latter")
    kind = "wandb" if settings.wandb_log else kind
    if kind == "none":
        return None
    title, start = TRACKERS[kind]
    name, off = settings.wandb_run_name or folder.name, "wandb_log=False" if settings.wandb_log else "logger=none"
    place = folder / kind
    existed = place.exists()
    try:
        return Tracker(title, start(place, step, settings.wandb_project, name, config))
    except Exception as error:  # whatever kind it is
        if not existed:
            shutil.rmtree(place, ignore_errors=True)
        offline = ", and the environment variable WANDB_MODE=offline without network and account"
        raise UserError(
            f"{title} can't log this run ({first_line(error) or type(error).__name__}): --{off} does without it"
            + (offline if kind == "wandb" else "")
        ) from None


def start_wandb(place: Path, step: int, project: str, name: str, config: dict[str, Any]) -> Any:
    path = place / "id"
    import wandb

    known = read_bytes(path).decode() if path.exists() else None
    run = wandb.init(
        project=project, name=name, config=config, dir=place.parent, id=known, resume="allow", allow_val_change=True
    )
    place.mkdir(exist_ok=True)
    write_file(path, run.id)
    return run


class Trackio:
    """A run of Trackio, which knows runs by their names; this one gets an ending that no other run has."""

    def __init__(self, place: Path, step: int, project: str, name: str, config: dict[str, Any]):
        path = place / "name"
        known = read_bytes(path).decode() if path.exists() else f"{name}-{secrets.token_hex(4)}"
        self._run = import_extra("trackio").init(project, name=known, config=config, resume="allow", embed=False)
        place.mkdir(exist_ok=True)
        write_file(path, known)

    def log(self, line: dict[str, Any], step: int) -> None:
        self._run.log({key: value for key, value in line.items() if key != "step"}, step=step)  # it warns of that key

    def finish(self) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard's files, in the folder of a run."""

    def __init__(self, place: Path, step: int, project: str, name: str, config: dict[str, Any]):
        import_extra("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(place, purge_step=step + 1 if step else None)
        self._writer.add_text(
            "config", f"    {json.dumps(config, indent=2, default=str)}".replace("\n", "\n    "), step
        )

    def log(self, line: dict[str, Any], step: int) -> None:
        for key, value in line.items():
            if isinstance(value, str):
                self._writer.add_text(key, value, step)
            else:
                self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self._writer.close()


TRACKERS = {
    "wandb": ("Weights & Biases", start_wandb),
    "tensorboard": ("TensorBoard", TensorBoard),
    "trackio": ("Trackio", Trackio),
}
