"""Turn a trained dense model into a mixture of experts, for further training (sparse upcycling, arXiv:2212.05055).

    python tools/upcycle.py out/modern upcycled --n_experts 8
    python train.py configs/modern.toml --init_from=upcycled --learning_rate=1e-4

MODEL is a run folder, a model directory, or the name of a published model, as in sample.py. Each expert starts as a
copy of the block's MLP, and the gates of a token's experts add up to 1, so the mixture computes what the model did.
The new routers and shared experts change nothing at first: the projections of shared experts start at zero.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import new_directory
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Natural, NonNegative, Positional, Seed, mistake


@dataclass(frozen=True, config=STRICT)
class Options:
    model: Positional[str]
    """A run folder, whose best checkpoint is used, a model directory, or a published model: gpt2, hf:OWNER/NAME."""
    output: Positional[Path]
    """The folder to write."""
    n_experts: Annotated[int, Ge(2)] = 8
    """Experts per block."""
    experts_per_token: Annotated[int, Ge(2)] = 2
    """Experts per token. A single one is weighted by its probability, so the mixture would not compute what the model
    did."""
    expert_interval: Count = 1
    """Every nth block gets experts; the others keep their MLP."""
    shared_experts: Natural = 0
    """New experts that process every token and output zero until they are trained."""
    balance_rate: NonNegative = 0.0
    """Change per update of the biases that balance the experts' load (.001 in arXiv:2408.15664). 0: no biases."""
    seed: Seed = 1337
    """Seed of the new routers' weights."""


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if options.output.is_file() or options.output.is_dir() and any(options.output.iterdir()):
        raise UserError(f"{options.output} holds something already: name another folder")

    import torch  # slow: import once the settings are valid

    from gpt_arc.alignment.reward_model import is_reward_model
    from gpt_arc.chat.format import load_with_chat
    from gpt_arc.finetuning.classifier import is_classifier
    from gpt_arc.planning.cost import describe_parameters
    from gpt_arc.weights.directory import refuse_images, save_model
    from gpt_arc.weights.tensor_files import check_range
    from gpt_arc.weights.upcycle import upcycled
    from model import GPTConfig

    if is_classifier(options.model) or is_reward_model(options.model):
        raise UserError(
            f"{options.model} has its own head, which the mixture would lose: name the model it was trained from"
        )
    refuse_images(options.model)
    model, tokenizer, chat = load_with_chat(options.model)
    if model.experts:
        raise UserError(f"{options.model} is a mixture of {model.config.n_experts} experts already")
    check_range(model.state_dict(), options.model)
    torch.manual_seed(options.seed)
    names = ("experts_per_token", "expert_interval", "shared_experts", "balance_rate")
    try:
        mixture = upcycled(model, options.n_experts, **{name: getattr(options, name) for name in names})
    except ValueError as error:  # settings that don't fit together
        raise UserError(mistake(error, GPTConfig)) from None
    with new_directory(options.output.resolve()) as temporary:
        save_model(mixture, tokenizer, temporary)
        if chat:
            chat.save(temporary)
    print(f"{options.output}: {describe_parameters(mixture, ' parameters')}, made from {model.num_parameters():,}")


if __name__ == "__main__":
    entry_point(main)()
