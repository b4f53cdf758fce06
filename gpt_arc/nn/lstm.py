"""An LSTM in place of self-attention, in each block of a language model."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from gpt_arc.nn.attention import KVCache, Mask
from gpt_arc.nn.functional import Dropout

if TYPE_CHECKING:
    from model import GPTConfig


class LSTMMixer(nn.Module):
    """Hochreiter and Schmidhuber's recurrence with as many units as the heads are wide, and a projection.

    A cache keeps the state after each token, the output U as keys and the cell as values. So a row goes on from any of
    its tokens, and what keeps, moves or drops keys and values serves states too.
    """

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.heads = config.n_head, config.head_width
        units = config.n_head * config.head_width
        self.lstm = nn.LSTM(config.n_embd, units, bias=config.bias, batch_first=True)
        self.projection = nn.Linear(units, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout_of("residual"))

    def forward(self, x: Tensor, rotary: None, mask: Mask, cache: KVCache | None = None) -> Tensor:
        """Returns a tensor shaped like x (B, T, C). Without a cache, `mask` says where the state starts anew."""
        with torch.autocast(x.device.type, enabled=False):  # it would change the type of the state
            inputs = x.type_as(self.projection.weight)
            if cache is not None:
                states = self.read_on(inputs, cache)
            elif mask is None:
                states, _ = self.lstm(inputs)
            else:
                assert isinstance(mask, Tensor), "can_pack refuses an LSTM"
                states = self.read_documents(inputs, mask)
        return self.dropout(self.projection(states))

    def read_documents(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns the outputs (B, T, U) for x (B, T, C), whose documents begin where `mask` (B, 1, T, T) does."""
        begins = mask[:, 0].int().argmax(-1) == torch.arange(x.size(1), device=x.device)  # (B, T)
        documents = x.flatten(0, 1).tensor_split(begins.flatten().nonzero()[1:, 0].cpu())
        states, _ = self.lstm(pack_sequence(list(documents), enforce_sorted=False))
        return torch.cat(unpack_sequence(states)).view(*x.shape[:2], -1)

    def read_on(self, x: Tensor, cache: KVCache) -> Tensor:
        """Returns the outputs (B, T, U) for x (B, T, C), which follows what is in the cache, and caches the states."""
        of_input, of_output, *biases = self.lstm.all_weights[0]
        empty = x.new_zeros(x.size(0), self.heads[0], x.size(1), self.heads[1])
        output = cell = empty[:, :, 0].flatten(1)  # (B, U)
        if cache.positions is not None:
            before = cache.positions[:, :1] - 1
            rows = torch.arange(len(x), device=x.device)[:, None]
            output, cell = (
                (kept[rows, :, before.clamp(min=0)].flatten(1) * (before >= 0)).type_as(x)
                for kept in cache.add(empty, empty)
            )
        outputs, cells = [], []
        for gates in F.linear(x, of_input, *biases[:1]).unbind(1):
            gates = gates + F.linear(output, of_output, *biases[1:])
            entered, kept, candidate, shown = gates.chunk(4, dim=-1)
            cell = kept.sigmoid() * cell + entered.sigmoid() * candidate.tanh()
            output = shown.sigmoid() * cell.tanh()
            outputs.append(output)
            cells.append(cell)
        states = torch.stack(outputs, dim=1)
        cache.add(*(x.unflatten(-1, self.heads).transpose(1, 2) for x in (states, torch.stack(cells, dim=1))))
        return states
