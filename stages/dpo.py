"""Train a model on rankings of responses directly, without a reward model: direct preference optimisation.

    python stages/dpo.py out/sft --train rankings.jsonl
    python stages/dpo.py out/sft --train rankings.jsonl --beta 0.5 --learning_rate 5e-6
    python stages/dpo.py out/sft --train rankings.jsonl --preview 3         show rows as tokens, and which are scored
    python stages/dpo.py --resume=out/dpo                                   resume a run that was stopped
    torchrun --standalone --nproc_per_node=8 stages/dpo.py dpo.toml

The reference is the model that the run starts from (arXiv:2305.18290). Files of rankings are as for stages/reward.py. A
run writes out/dpo/ (or out/dpo-2, -3 ...): run.json, metrics.jsonl and checkpoints, with the lowest val loss as `best`.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401
    from gpt_arc.training.arguments import check_stage_arguments
    from gpt_arc.training.stage_options import DPOOptions

    check_stage_arguments(DPOOptions, __doc__)


from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt_arc import distributed
from gpt_arc.alignment.losses import agreement, dpo_loss, log_probabilities, response_states
from gpt_arc.alignment.policy import fingerprint, load_policy
from gpt_arc.alignment.rankings import EncodedRanking, encode_split, padded, pairs_of, preview_rankings
from gpt_arc.chat.files import read_rankings
from gpt_arc.device import autocast, send
from gpt_arc.distributed import WORLD_SIZE, say
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.tables import counted
from gpt_arc.training.command_line import run_stage
from gpt_arc.training.epochs import EpochOrder, digest, micro_batches
from gpt_arc.training.routers import RouterMeter
from gpt_arc.training.stage_options import DPOOptions
from gpt_arc.training.stage_run import StageRun
from gpt_arc.weights.directory import save_model
from model import GPT


class ResponseLikelihood(nn.Module):
    """Computes the log-probability of each response of a batch of rankings in one forward pass."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        """Returns log-probabilities (N,) in nats. `prompts` (N,) are lengths; responses and mask are (N, R)."""
        hidden = self.model.hidden(tokens, lengths=prompts + mask.sum(1) - 1)  # the last token isn't read
        states = response_states(hidden, prompts, responses.size(1))
        logs, _ = log_probabilities(self.model, states, responses)
        return torch.where(mask, logs, 0.0).sum(1)


def batch_of(rankings: Sequence[EncodedRanking], device: torch.device) -> tuple[Tensor, ...]:
    """The arguments of `ResponseLikelihood.forward`."""
    tokens, _ = padded([sequence[:-1] for ranking in rankings for sequence in ranking.sequences], device)
    responses, lengths = padded([response for ranking in rankings for response in ranking.responses], device)
    prompts = send([len(r.prompt) for r in rankings for _ in r.responses], device)
    return tokens, prompts, responses, torch.arange(responses.size(1), device=device) < lengths[:, None]


@torch.no_grad()
def likelihoods(
    model: ResponseLikelihood, examples: Sequence[EncodedRanking], size: int, run: StageRun
) -> list[Tensor]:
    """Returns the log-probabilities (K,) of each ranking's K responses, computed by all processes together."""
    totals = [torch.zeros(len(example.responses), device=run.device) for example in examples]
    for rows, weight in micro_batches(range(len(examples)), size):
        with autocast(run.device, run.dtype):
            logs = model(*batch_of([examples[row] for row in rows], run.device)).float()
        for row, responses in zip(rows, logs.split([len(examples[row].responses) for row in rows])):
            totals[row] += responses * weight
    if examples:
        sizes = [len(each) for each in totals]
        totals = list(distributed.sum_over_ranks(torch.cat(totals)).split(sizes))
    return totals


def train(options: DPOOptions, run: StageRun) -> int:
    # ---- the rankings, and the reference's log-probabilities of them
    reference, tokenizer, chat = load_policy(options.base_model)
    if options.train is None:
        raise UserError("name the rankings to learn from by --train")
    read, context = partial(read_rankings, columns=options.columns), reference.config.block_size
    if options.preview:
        return preview_rankings(read(options.train)[: options.preview], chat, context)
    splits = options.splits(read)
    say(f"parameters     {describe_parameters(reference)}")
    encoded = {name: encode_split(name, split, chat, context) for name, split in splits.items()}
    examples = encoded["train"]
    order = EpochOrder(len(examples), options.examples_per_update, options.seed)
    updates = order.updates(options.epochs)
    say(f"updates        {updates:,} of {counted(options.examples_per_update, 'ranking')}")
    run.fit(reference.config)
    run.open(digest([fingerprint(reference), examples]))
    scorer = ResponseLikelihood(reference).eval()
    run.parallel.place_frozen(scorer, run.device)
    base = {name: likelihoods(scorer, split, options.batch_size, run) for name, split in encoded.items()}
    del reference, scorer

    # ---- the run: a new one, or a stopped one from its last checkpoint
    model, _, _ = load_policy(run.origin)
    model.activation_checkpointing = options.activation_checkpointing
    policy = ResponseLikelihood(model).eval()  # like the reference: dropout would add noise to their ratio
    routers = RouterMeter(model, frozen=True)  # moving them would be one more change of the policy
    replica = run.place(policy)
    updater = run.updater(policy, updates)
    run.restore(updater, {})

    def write(whole: ResponseLikelihood, directory: Path) -> None:
        save_model(whole.model, tokenizer, directory)
        chat.save(directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The training loop. The loss is the mean over a prompt's pairs, then over the update's prompts.
    progress = run.progress
    while run.goes_on(updates):
        rows = order.rows(progress.step)
        micros = list(micro_batches(rows, options.batch_size))
        sums = torch.zeros(3, device=run.device)
        for i, (micro, weight) in enumerate(micros, start=1):
            batch = [examples[row] for row in micro]
            pairs = pairs_of(batch, run.device)
            with run.parallel.sharing_gradients(replica, i == len(micros)):
                with autocast(run.device, run.dtype):
                    logs = replica(*batch_of(batch, run.device))
                ratios = logs - torch.cat([base["train"][row] for row in micro])
                loss = dpo_loss(ratios, *pairs, options.beta)
                updater.backward(loss * (weight * WORLD_SIZE / len(rows)))
            margins = options.beta * (ratios[pairs.better] - ratios[pairs.worse]).detach()
            means = [(agreement(margins) * pairs.weights).sum(), (margins * pairs.weights).sum()]
            sums += weight * torch.stack((loss.detach(), *means))
            routers.add()
        result = run.update(updater, progress.step, *sums)
        routers.step(result is not None)
        if result is None:
            continue
        rate, norm, sums = result
        progress.step += 1
        line = dict(zip(("train_loss", "accuracy", "margin"), (value / len(rows) for value in sums)))
        line |= {"learning_rate": rate, "grad_norm": norm, **routers.take()}
        epoch_ended = progress.step % order.per_epoch == 0
        line |= {"epoch": progress.step // order.per_epoch} if epoch_ended else {}
        if epoch_ended and "val" in encoded:
            with run.parallel.evaluating(policy):
                after = likelihoods(policy, encoded["val"], options.batch_size, run)
            ratios, pairs = torch.cat(after) - torch.cat(base["val"]), pairs_of(encoded["val"], run.device)
            right = agreement(ratios[pairs.better] - ratios[pairs.worse]) * pairs.weights
            line["val_loss"] = dpo_loss(ratios, *pairs, options.beta).item() / len(after)
            line["val_accuracy"] = right.sum().item() / len(after)
        run.tell(line, f"loss {line['train_loss']:.4f}", updates)
        if epoch_ended:
            say(
                f"epoch {progress.step // order.per_epoch}: "
                + ", ".join(
                    f"{name} {line[name]:.4f}" for name in ("train_loss", "val_loss", "val_accuracy") if name in line
                )
            )
            run.save(write, line.get("val_loss"))
    steps = {
        command("sample.py", "--chat", run.folder): "talk with it",
        command("stages/eval.py", run.folder, "--chat", "--tasks=TASK.toml", "--data=ITEMS.jsonl"): "measure it",
    }
    return run.finish(write, steps)


def main() -> int:
    return run_stage(DPOOptions, __doc__, "dpo", train)


if __name__ == "__main__":
    entry_point(main)()
