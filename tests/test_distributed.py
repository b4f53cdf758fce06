"""Process groups, without other processes."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from gpt_arc import distributed


@pytest.mark.parametrize(("backends", "device"), [("gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cuda:0")])
def test_a_group_sends_objects_by_gloo_and_outlives_the_run(monkeypatch, backends, device):
    """Gloo's destructor, called when the last module that uses it goes, can wait forever for Python's lock."""
    calls = []
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(dist, "init_process_group", lambda *names, **settings: calls.append((*names, settings)))
    monkeypatch.setattr(distributed.WATCH, "start", lambda patience: calls.append(patience))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    with distributed.process_group("auto", torch.device(device), timeout_minutes=90):
        pass
    [(name, settings), patience] = calls
    assert patience == 45 * 60  # seconds: half the time-out
    assert name == backends and settings["timeout"] == timedelta(minutes=90)
    assert settings["device_id"] == (torch.device(device) if device != "cpu" else None)


@pytest.mark.parametrize(
    ("processes", "machines", "command"),
    [
        (1, 1, "python 'a b.py' --resume=out/x"),
        (2, 1, "torchrun --standalone --nproc_per_node=2 'a b.py' --resume=out/x"),
        (
            16,
            2,
            "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT --nproc_per_node=8 'a b.py' "
            "--resume=out/x",
        ),
    ],
)
def test_the_command_to_launch_again(monkeypatch, processes, machines, command):
    monkeypatch.setattr(distributed, "WORLD_SIZE", processes)
    monkeypatch.setattr(distributed, "MACHINES", machines)
    assert distributed.launch_command("a b.py", "--resume=out/x") == command
    separated = distributed.launch_command("a b.py", "--monitor=m:f")
    assert ("-- 'a b.py' --monitor=m:f" in separated) == (processes > 1)
