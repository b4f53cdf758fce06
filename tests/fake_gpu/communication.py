"""What the processes of a run send each other in an update, counted in one of them with torch's fake process group.

It computes on the CPU, and what it sends arrives nowhere. WORLD_SIZE has to be set before anything is imported.
"""

import json
import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Traffic(TorchDispatchMode):
    """Records collectives as (name, bytes of the largest argument, FLOPs computed so far)."""

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[str, int, int]] = []
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            size = max(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))
            self.sent.append((func._schema.name.removeprefix("c10d::").strip("_"), size, self.flops))
        elif func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def record_bucket(traffic: Traffic, bucket: dist.GradBucket, process_group: Any) -> torch.futures.Future[Tensor]:
    """Stands in for `allreduce_hook`, which sums a bucket of DistributedDataParallel in code that can't be traced."""
    traffic.sent.append(("allreduce", bucket.buffer().nbytes, traffic.flops))
    summed = torch.futures.Future()
    summed.set_result(bucket.buffer())
    return summed


def update(config: dict[str, Any], training: dict[str, Any], rows: int) -> dict[str, Any]:
    """The second update of a model: all collectives, the FLOPs of both passes, and where the backward pass begins."""
    from gpt_arc.device import autocast
    from gpt_arc.distributed import WORLD_SIZE
    from gpt_arc.training import expert_parallel
    from gpt_arc.training import parallel as replicated
    from gpt_arc.training.config import TrainingConfig
    from gpt_arc.training.optim import Updater
    from gpt_arc.training.parallel_modes import make_parallel
    from gpt_arc.training.tensor_parallel import make_shares
    from model import GPT, GPTConfig

    def exchanged(x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        rows = x.new_zeros(sum(received), *x.shape[1:])
        dist.all_to_all_single(rows, x.contiguous(), received, sent, group=group)
        return rows

    expert_parallel.exchanged = exchanged
    torch.empty_like = torch.zeros_like  # nothing arrives, and numbers of rows have to be some
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    cpu, settings = torch.device("cpu"), TrainingConfig(**{"dtype": "bfloat16"} | training)
    parallel = make_parallel(settings, cpu, "bfloat16")
    model = GPT(GPTConfig(**config))
    parameters = model.num_parameters()
    sharing = make_shares(settings, cpu)
    replica = parallel.place(model, cpu, sharing=sharing)
    updater = Updater(model, settings, cpu, "bfloat16", parallel, sharing)
    tokens = torch.randint(model.config.vocab_size, (rows, model.config.block_size))
    traffic = Traffic()
    replicated.allreduce_hook = partial(record_bucket, traffic)
    for _ in range(2):
        traffic.sent, traffic.flops = [], 0
        with traffic:
            with parallel.sharing_gradients(replica, True):
                with autocast(cpu, "bfloat16"):
                    loss = replica(tokens, tokens)
                forward = traffic.flops
                updater.backward(loss.total + sum(loss.auxiliary.values()))
            updater.update(1e-3, loss.total.detach())
    return {"parameters": parameters, "forward": forward, "flops": traffic.flops, "sent": traffic.sent}


if __name__ == "__main__":
    print("\n" + json.dumps(update(*json.loads(sys.argv[1]))))
