"""Train a model on rankings of responses directly, without a reward model: direct preference optimisation.

    python stages/dpo.py out/sft --train rankings.jsonl
    python stages/dpo.py out/sft --train rankings.jsonl --beta 0.5 --learning_rate 5e-6
    python stages/dpo.py --resume=out/dpo                                   resume a run that was stopped
    torchrun --standalone --nproc_per_node=8 stages/dpo.py configs/dpo.toml

The reference is the model that the run starts from. Rankings are those of stages/reward.py. A run writes out/dpo/ (or
-2, -3 ...): run.json, metrics.jsonl and checkpoints, the model of the lowest val loss as `best` (arXiv:2305.18290).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gpt_arc import distributed
from gpt_arc.alignment.losses import dpo_loss, log_probabilities, response_states
from gpt_arc.alignment.rankings import EncodedRanking, described_rankings, padded, pairs_of
from gpt_arc.alignment.reward_model import fingerprint
from gpt_arc.alignment.rollouts import load_policy
from gpt_arc.chat.files import read_rankings
from gpt_arc.device import autocast
from gpt_arc.distributed import WORLD_SIZE, say
from gpt_arc.errors import UserError, entry_point
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.settings import STRICT, Count, NonNegative, Positive, Share
from gpt_arc.training.command_line import run_stage
from gpt_arc.training.epochs import EpochOrder, digest, micro_batches
from gpt_arc.training.options import ExampleOptions
from gpt_arc.training.stage_run import StageRun
from gpt_arc.weights.directory import save_model
from model import GPT


@dataclass(frozen=True, config=STRICT)
class Options(ExampleOptions):
    beta: Positive = 0.1
    """Reward is beta times the log-ratio to the reference: the larger, the nearer the model stays to it."""
    gradient_accumulation_steps: Count = 8
    learning_rate: Positive = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    min_lr: NonNegative | None = 0.0
    warmup: Share = 0.1


class ResponseLikelihood(nn.Module):
    """The log-probability of each response of rankings, in one forward pass."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities (N,) in nats; `prompts` (N,) are lengths, responses and mask (N, R)."""
        states = response_states(self.model.hidden(tokens), prompts, responses.size(1))
        logs, _ = log_probabilities(self.model, states, responses)
        return torch.where(mask, logs, 0.0).sum(1)


def batch_of(rankings: Sequence[EncodedRanking], device: torch.device) -> tuple[Tensor, ...]:
    """What `ResponseLikelihood` is called with."""
    tokens, _ = padded([sequence[:-1] for ranking in rankings for sequence in ranking.sequences], device)
    responses, lengths = padded([response for ranking in rankings for response in ranking.responses], device)
    prompts = torch.tensor([len(r.prompt) for r in rankings for _ in r.responses], device=device)
    return tokens, prompts, responses, torch.arange(responses.size(1), device=device) < lengths[:, None]


@torch.no_grad()
def likelihoods(
    model: ResponseLikelihood, examples: Sequence[EncodedRanking], size: int, stage: StageRun
) -> list[Tensor]:
    """Of each ranking the log-probabilities (K,) of its responses, shared out to the processes."""
    found = [torch.zeros(len(example.responses), device=stage.device) for example in examples]
    for rows, counts in micro_batches(range(len(examples)), size):
        with autocast(stage.device, stage.dtype):
            logs = model(*batch_of([examples[row] for row in rows], stage.device)).float()
        for row, own in zip(rows, logs.split([len(examples[row].responses) for row in rows])):
            found[row] += own * counts
    if examples:
        sizes = [len(each) for each in found]
        found = list(distributed.sum_over_ranks(torch.cat(found)).split(sizes))
    return found


def train(options: Options, stage: StageRun) -> int:
    # ---- the rankings, and what the reference says of them
    reference, tokenizer, chat = load_policy(options.model)
    if options.train is None:
        raise UserError("name the rankings to learn from by --train")
    splits = options.splits(read_rankings)
    say(f"parameters     {describe_parameters(reference)}")
    context = reference.config.block_size
    encoded = {name: described_rankings(name, split, chat, context) for name, split in splits.items()}
    examples = encoded["train"]
    order = EpochOrder(len(examples), options.examples_per_update, options.seed)
    updates = order.updates(options.epochs)
    say(f"updates        {updates:,} of {options.examples_per_update} rankings")
    stage.open(digest([fingerprint(reference), examples]))
    judge = ResponseLikelihood(reference.to(stage.device)).eval()
    base = {name: likelihoods(judge, split, options.batch_size, stage) for name, split in encoded.items()}
    del reference, judge

    # ---- the run, where a stopped one stood
    model, _, _ = load_policy(stage.origin)
    model.activation_checkpointing = options.activation_checkpointing
    policy = ResponseLikelihood(model).eval()  # as the reference: dropout would be noise in their ratio
    replica = stage.place(policy)
    updater = stage.updater(policy, updates)
    stage.restore(updater, {})

    def write(directory: Path) -> None:
        save_model(model, tokenizer, directory)
        chat.save(directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The training loop. The loss is the mean over the pairs of a prompt, then over the prompts of the update.
    progress = stage.progress
    while stage.goes_on(updates):
        rows = order.rows(progress.step)
        micros = list(micro_batches(rows, options.batch_size))
        sums = torch.zeros(3, device=stage.device)
        for i, (own, counts) in enumerate(micros, start=1):
            batch = [examples[row] for row in own]
            pairs = pairs_of(batch, stage.device)
            with stage.last_sync(replica, i == len(micros)):
                with autocast(stage.device, stage.dtype):
                    logs = replica(*batch_of(batch, stage.device))
                ratios = logs - torch.cat([base["train"][row] for row in own])
                loss = dpo_loss(ratios, *pairs, options.beta)
                updater.backward(loss * (counts * WORLD_SIZE / len(rows)))
            margins = options.beta * (ratios[pairs.better] - ratios[pairs.worse]).detach()
            means = [((margins > 0) * pairs.weights).sum(), (margins * pairs.weights).sum()]
            sums += counts * torch.stack((loss.detach(), *means))
        done = stage.update(updater, progress.step, *sums)
        if done is None:
            continue
        rate, norm, sums = done
        progress.step += 1
        line = dict(zip(("loss", "accuracy", "margin"), (value / len(rows) for value in sums)))
        line |= {"learning_rate": rate, "grad_norm": norm}
        ended = progress.step % order.per_epoch == 0
        if ended and "val" in encoded:
            found = likelihoods(policy, encoded["val"], options.batch_size, stage)
            ratios, pairs = torch.cat(found) - torch.cat(base["val"]), pairs_of(encoded["val"], stage.device)
            right = (ratios[pairs.better] > ratios[pairs.worse]) * pairs.weights
            line["val_loss"] = dpo_loss(ratios, *pairs, options.beta).item() / len(found)
            line["val_accuracy"] = right.sum().item() / len(found)
        stage.tell(line, f"loss {line['loss']:.4f}", updates)
        if ended:
            say(
                f"epoch {progress.step // order.per_epoch}: "
                + ", ".join(f"{name} {line[name]:.4f}" for name in ("loss", "val_loss", "val_accuracy") if name in line)
            )
            stage.save(write, line.get("val_loss"))
    return stage.finish(write)


def main() -> int:
    return run_stage(Options, __doc__, "dpo", train)


if __name__ == "__main__":
    entry_point(main)()
