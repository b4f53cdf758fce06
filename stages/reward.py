"""Train a reward model on rankings of responses: InstructGPT's second step.

    python stages/reward.py out/sft --train rankings.jsonl
    python stages/reward.py out/sft --train rankings.jsonl --val held_out.jsonl --demonstrations chats.jsonl
    python stages/reward.py out/sft --train rankings.jsonl --preview 3      show rows as tokens, and which are scored
    python stages/reward.py out/reward --val other.jsonl                    measure a reward model
    python stages/reward.py --resume=out/reward                             continue a stopped run
    torchrun --standalone --nproc_per_node=8 stages/reward.py reward.toml

A row has a prompt with chosen and rejected responses, or several responses from the best to the worst, or with ranks:
see `gpt_arc/chat/files.py`. A run writes out/reward/ (or out/reward-2, -3 ...): run.json, metrics.jsonl, report.json
and checkpoints.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401
    from gpt_arc.training.arguments import check_stage_arguments
    from gpt_arc.training.stage_options import RewardOptions

    check_stage_arguments(RewardOptions, __doc__)


from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt_arc.alignment.losses import agreement, ranking_loss
from gpt_arc.alignment.rankings import EncodedRanking, encode_split, padded, pairs_of, preview_rankings
from gpt_arc.alignment.reward_model import (
    RewardModel,
    is_reward_model,
    load_reward_model,
    preference_report,
    save_reward_model,
    score_sequences,
)
from gpt_arc.chat.batches import encode_conversations
from gpt_arc.chat.files import read_conversations, read_rankings
from gpt_arc.chat.format import load_chat_model
from gpt_arc.device import autocast
from gpt_arc.distributed import IS_MAIN, WORLD_SIZE, say
from gpt_arc.errors import UserError, entry_point, naming
from gpt_arc.files import command, write_file
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.tables import counted, table, to_json
from gpt_arc.training.command_line import run_stage
from gpt_arc.training.epochs import EpochOrder, digest, micro_batches
from gpt_arc.training.routers import RouterMeter
from gpt_arc.training.runs import shortened
from gpt_arc.training.stage_options import RewardOptions
from gpt_arc.training.stage_run import StageRun, Write
from gpt_arc.weights.edit import with_settings


def measure(
    model: RewardModel, examples: Sequence[EncodedRanking], options: RewardOptions, run: StageRun
) -> dict[str, Any]:
    """Reports loss, accuracy, calibration and agreement by gap over the pairs of rankings."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    size = 4 * options.batch_size
    with run.parallel.evaluating(model):
        scores = score_sequences(model, sequences, size, run.device, run.dtype)
    pairs = pairs_of(examples, torch.device("cpu"))
    report = preference_report((scores[pairs.better] - scores[pairs.worse]).tolist())
    loss = ranking_loss(scores, *pairs).item() / len(examples)
    return {"loss": loss, **report, "mean_score": scores.mean().item(), "score_std": scores.std().item()}


def show(report: dict[str, Any]) -> None:
    say(f"pairs {report['pairs']:,}: loss {report['loss']:.4f}, accuracy {report['accuracy']:.4f} ± "
        f"{report['standard_error']:.4f}, calibration error {report['calibration_error']:.4f}")  # fmt: skip
    rows = [["score gap", "pairs", "predicted", "agreed"]]
    rows += [[f"{b['from']:.2f} to {b['to']:.2f}", b["pairs"], b["predicted"], b["agreed"]] for b in report["by_gap"]]
    say(table(rows))


def train(options: RewardOptions, run: StageRun) -> int:
    # ---- the model; a reward model is trained further, or only measured
    if is_reward_model(run.origin):
        model, tokenizer, chat = load_reward_model(run.origin)
    else:
        trunk, tokenizer, chat = load_chat_model(run.origin)
        model = RewardModel(trunk)
    if options.residual_dropout is not None:
        head, trunk = model.head, with_settings(model.trunk, residual_dropout=options.residual_dropout)
        model = RewardModel(trunk)
        model.head = head
    model.head.bias.requires_grad_(False)  # the pairwise loss doesn't depend on it
    context = model.trunk.config.block_size
    model.trunk.activation_checkpointing = options.activation_checkpointing
    read = partial(read_rankings, columns=options.columns)
    if options.preview and (source := options.train or options.val):
        return preview_rankings(read(source)[: options.preview], chat, context)
    if options.train is None:
        if options.val is None or not is_reward_model(run.origin):
            raise UserError(
                "name the rankings to learn from by --train, or a reward model and its test rankings by --val"
            )
        examples = encode_split("val", read(options.val), chat, context)
        with naming(options.model):
            show(measure(model.to(run.device), examples, options, run))
        return 0

    # ---- the rankings, and the plan in figures
    splits = options.splits(read)
    say(f"parameters     {describe_parameters(model)}")
    encoded = {name: encode_split(name, split, chat, context) for name, split in splits.items()}
    examples = encoded["train"]
    demonstrations = []
    if options.demonstrations:
        shown = encode_conversations(read_conversations(options.demonstrations), chat, context - 1)
        demonstrations = [example.tokens for example in shown.examples]
        if not demonstrations:
            raise UserError(f"no conversation of {options.demonstrations} fits into the context of {context} tokens")
    order = EpochOrder(len(examples), options.examples_per_update, options.seed)
    updates = order.updates(options.epochs)
    say(f"updates        {updates:,} of {counted(options.examples_per_update, 'ranking')}")

    # ---- the run: a new one, or a stopped one from its last checkpoint
    run.fit(model.trunk.config)
    run.open(digest([examples, demonstrations]))
    replica = run.place(model)
    updater, routers = run.updater(model, updates), RouterMeter(model.trunk)
    run.restore(updater, {})

    def write(whole: RewardModel, directory: Path) -> None:
        save_reward_model(whole, tokenizer, chat, directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The training loop. All responses to a prompt share a micro-batch. The loss is the mean over a prompt's pairs, then
    # over the update's prompts.
    progress = run.progress
    model.train()
    while run.goes_on(updates):
        rows = order.rows(progress.step)
        micros = list(micro_batches(rows, options.batch_size))
        sums = torch.zeros(2, device=run.device)
        for i, (micro, weight) in enumerate(micros, start=1):
            batch = [examples[row] for row in micro]
            pairs = pairs_of(batch, run.device)
            with run.parallel.sharing_gradients(replica, i == len(micros)):
                with autocast(run.device, run.dtype):
                    scores = replica(*padded([s for example in batch for s in example.sequences], run.device))
                loss = ranking_loss(scores, *pairs)
                routing = sum(model.trunk.router_losses().values()) / len(micros)  # a mixture of experts' router losses
                updater.backward(weight * (loss * (WORLD_SIZE / len(rows)) + routing))
            right = (agreement(scores[pairs.better] - scores[pairs.worse]) * pairs.weights).sum()
            sums += weight * torch.stack((loss.detach(), right))
            routers.add()
        result = run.update(updater, progress.step, *sums)
        routers.step(result is not None)
        if result is None:
            continue
        rate, norm, (loss, right) = result
        progress.step += 1
        line = {"train_loss": loss / len(rows), "accuracy": right / len(rows), "learning_rate": rate, "grad_norm": norm}
        line |= routers.take()
        epoch_ended = progress.step % order.per_epoch == 0
        report = None
        if epoch_ended:
            line["epoch"] = progress.step // order.per_epoch
            run.check_finite()
            centre(model, demonstrations, options, run)
        if epoch_ended and "val" in encoded:
            report = measure(model, encoded["val"], options, run)
            line |= {f"val_{name}": report[name] for name in ("loss", "accuracy", "calibration_error")}
        run.tell(line, f"loss {loss / len(rows):.4f}", updates)
        if report:
            show(report)
        if epoch_ended:
            run.save(write, report["loss"] if report else None)
    return finish(options, run, write, encoded.get("val") if progress.step == updates else None)


def finish(options: RewardOptions, run: StageRun, write: Write, val: Sequence[EncodedRanking] | None) -> int:
    """Ends the run, and reports how the best model does on `val`. Returns the exit code."""
    policy = "MODEL" if is_reward_model(options.base_model) else shortened(options.base_model)
    steps = {
        command("stages/ppo.py", policy, "--prompts=PROMPTS.jsonl", f"--reward={run.folder}"): "learn from it",
        command("stages/reward.py", run.folder, "--val=RANKINGS.jsonl"): "measure it on other rankings",
    }
    code = run.finish(write, steps)
    if IS_MAIN and val:
        model = load_reward_model(run.folder)[0].to(run.device)  # the best, which may not be the last
        report = {"step": run.progress.best_step, **measure(model, val, options, run)}
        write_file(run.folder / "report.json", to_json(report, indent=1) + "\n")
    return code


@torch.no_grad()
def centre(model: RewardModel, demonstrations: Sequence[list[int]], options: RewardOptions, run: StageRun) -> None:
    """Sets the head's bias so that demonstrations score 0 on average; the pairwise loss doesn't depend on it."""
    if demonstrations:
        size = 4 * options.batch_size
        with run.parallel.evaluating(model):
            scores = score_sequences(model, demonstrations, size, run.device, run.dtype)
        model.head.bias.sub_(scores.mean())


def main() -> int:
    return run_stage(RewardOptions, __doc__, "reward", train)


if __name__ == "__main__":
    entry_point(main)()
