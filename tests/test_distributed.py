"""Process groups, without other processes."""

import pytest
import torch
import torch.distributed as dist

from gpt_arc import distributed


@pytest.mark.parametrize(("backend", "device", "destroyed"), [("gloo", "cpu", False), ("nccl", "cuda:0", True)])
def test_a_gloo_group_outlives_the_run(monkeypatch, backend, device, destroyed):
    """Its destructor, called when the last module that uses it goes, can wait forever for Python's lock."""
    calls = []
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, device_id: calls.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    with distributed.process_group("auto", torch.device(device)):
        assert calls == [backend]
    assert calls == [backend] + ["destroyed"] * destroyed


@pytest.mark.parametrize(
    ("processes", "command"),
    [
        (1, "python 'a b.py' --resume=out/x"),
        (2, "torchrun --standalone --nproc_per_node=2 'a b.py' --resume=out/x"),
    ],
)
def test_the_command_to_launch_again(monkeypatch, processes, command):
    monkeypatch.setattr(distributed, "WORLD_SIZE", processes)
    assert distributed.launch_command("a b.py", "--resume=out/x") == command
    separated = distributed.launch_command("a b.py", "--monitor=m:f")
    assert ("-- 'a b.py' --monitor=m:f" in separated) == (processes > 1)
