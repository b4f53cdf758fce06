"""The policy that PPO and DPO train, and the critic that PPO trains with it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from gpt_arc.alignment.losses import log_probabilities, response_states
from gpt_arc.alignment.reward_model import RewardModel, ScalarHead, is_reward_model
from gpt_arc.chat.format import ChatFormat, load_chat_model
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.errors import UserError
from model import GPT


def load_policy(path: Path | str) -> tuple[GPT, Tokenizer, ChatFormat]:
    """Loads a chat model. Raises UserError, also for a reward model, which can't write."""
    if is_reward_model(path):
        raise UserError(f"{path} is a reward model: name the model that it was trained from")
    return load_chat_model(path)


def fingerprint(model: nn.Module) -> str:
    """Hashes a model's weights: evenly spaced elements, about a thousand of each tensor."""
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        flat = tensor.detach().flatten()
        sha.update(flat[:: max(len(flat) // 1000, 1)].float().cpu().numpy().tobytes())
    return sha.hexdigest()


class ReferencePolicy(nn.Module):
    """The model that a policy is held to."""

    def __init__(self, model: GPT, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, tokens: Tensor, prompt_lengths: Tensor, responses: Tensor) -> Tensor:
        """Returns log-probabilities (N, R) of responses (N, R) within tokens (N, T)."""
        states = response_states(self.model.hidden(tokens), prompt_lengths, responses.size(1))
        return log_probabilities(self.model, states, responses, self.temperature)[0]


class ActorCritic(nn.Module):
    """A policy and its critic: a separate network, or a head on the policy; and a moving average of the policy."""

    def __init__(self, policy: GPT, critic: RewardModel | ScalarHead, temperature: float, average: GPT | None = None):
        super().__init__()
        self.policy, self.critic, self.temperature, self.average = policy, critic, temperature, average

    def forward(
        self,
        tokens: Tensor,
        prompt_lengths: Tensor,
        responses: Tensor,
        text: Sequence[Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns log-probabilities, entropies and values, each (N, R), of responses (N, R) within tokens (N, T).

        With `text`, tokens and targets (B, T), also returns the policy's summed language-model loss on it. Everything
        is one forward pass, as DistributedDataParallel requires. `lengths` (N,): tokens of a row without padding.
        """
        text_loss = None if text is None else self.policy(*text).total
        hidden, length = self.policy.hidden(tokens, lengths=lengths), responses.size(1)
        states = response_states(hidden, prompt_lengths, length)
        logs, entropies = log_probabilities(self.policy, states, responses, self.temperature)
        if isinstance(self.critic, RewardModel):
            states = response_states(self.critic.trunk.hidden(tokens), prompt_lengths, length)
            values = self.critic.head(states)
        else:
            values = self.critic(states)
        return logs, entropies, values, text_loss
