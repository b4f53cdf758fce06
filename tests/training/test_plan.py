"""What a plan refuses, and what it doubts."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.reading import read_json
from gpt_arc.training.command_line import read_command_line
from gpt_arc.training.plan import make_plan
from helpers import ROOT, TEXT, TINY_FLAGS, write_dataset


@pytest.fixture
def plan(tmp_path, monkeypatch, stage_runner):
    """Prints the plan of a tiny run on some sums."""
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer.from_text(TEXT)
    write_dataset(
        tmp_path / "data" / "sums", tokenizer, {"train": tokenizer.encode(TEXT), "val": tokenizer.encode(TEXT)}
    )
    (tmp_path / "sums.toml").write_text('dataset = "sums"\n')
    return lambda *flags: stage_runner(train, "sums.toml", *TINY_FLAGS[:-1], "--dry_run", *flags)


@pytest.mark.parametrize(("rank", "local_rank", "prepares"), [(0, 0, True), (3, 3, False), (8, 0, True)])
def test_every_machine_prepares_what_it_does_not_find(plan, monkeypatch, rank, local_rank, prepares):
    """The main process first, then the first one of each other machine, which may have another disk."""
    events = []
    monkeypatch.setattr("gpt_arc.training.plan.IS_MAIN", rank == 0)
    monkeypatch.setattr("gpt_arc.training.plan.LOCAL_RANK", local_rank)
    monkeypatch.setattr("gpt_arc.training.plan.prepare_missing", lambda sources: events.append("prepares"))
    monkeypatch.setattr("gpt_arc.distributed.from_main", lambda value: events.append("waits") or value)
    make_plan(read_command_line(["sums.toml", *TINY_FLAGS], None), torch.device("cpu"))
    assert ("prepares" in events) == prepares
    assert events[0] == ("prepares" if rank == 0 else "waits") and events.count("waits") == 2


def test_a_dry_run_says_how_long_this_device_would_take(plan, monkeypatch):
    monkeypatch.setattr("gpt_arc.training.plan.peak_flops", lambda device, name, dtype: 2e9)
    shown = plan("--max_iters=50000", "--device_mfu=0.25")
    flops, unit = re.search(r"operations +([\d.]+)(k|M)FLOP a token", shown).groups()
    tokens = int(re.search(r"tokens a step +([\d,]+)", shown)[1].replace(",", ""))
    minutes = float(flops) * {"k": 1e3, "M": 1e6}[unit] * tokens * 50_000 / (2e9 * 0.25) / 60
    found, rest = re.search(r"time +about ([\d.]+) (.*)", shown).groups()
    assert float(found) == pytest.approx(minutes, rel=0.05)
    assert rest == "minutes at 25% of the device's 2GFLOP a second"
    assert "time  " not in plan("--accelerator=h100")


@pytest.mark.parametrize("steps", [8, 2000])
def test_a_warmup_longer_than_the_run_is_refused_with_a_flag_that_mends_it(plan, steps, tmp_path):
    (tmp_path / "slow.toml").write_text(f"warmup_iters = {steps}")
    refused = plan("slow.toml")
    assert refused.code == 2 and "so the learning rate never reaches its peak" in refused.message
    mend = re.search(r"--warmup=\S+", refused.message)[0]
    assert "device         cpu" in plan("slow.toml", mend)


def test_the_warmup_of_a_preset_follows_a_shortened_run(plan, stage_runner):
    for preset in ("gpt2", "modern", "moe", "gpt1", "quickstart", "tinyshakespeare"):
        shown = stage_runner(train, preset, "--dataset=sums", "--max_iters=200", "--dry_run", "--device=cpu")
        assert "steps          200" in shown


def test_the_cost_of_a_run_in_days_and_money(plan, stage_runner):
    """GPT-3's table D.1 has 3.14e23 FLOPs for 175B parameters and 300B tokens, without attention's."""
    flags = ("--accelerator=v100", "--devices=1000", "--device_mfu=0.3", "--device_price=2", "--device=cpu")
    shown = stage_runner(train, "gpt3_175b", "--dry_run", *flags)
    pattern = r"cost +(\S+) FLOPs: (\S+) days on 1,000 v100 at 30% of peak, ([\d,]+) at 2 an hour"
    flops, days, money = (float(each.replace(",", "")) for each in re.search(pattern, shown).groups())
    assert flops == pytest.approx(3.14e23, rel=0.035)
    assert days == pytest.approx(flops / (1000 * 0.3 * 125e12) / 86_400, rel=0.01)
    assert money == pytest.approx(1000 * 24 * 2 * days, rel=0.01)
    assert "cost" not in plan()


def test_a_dry_run_shows_what_fsdp_takes_on_accelerators(plan, stage_runner):
    flags = "--parallel=fsdp", "--accelerator=h100", "--activation_checkpointing=True", "--device=cpu", "--dry_run"
    shown = stage_runner(train, "gpt3_175b", *flags, "--devices=768")
    total, *parts = re.findall(r"([\d.]+)([MG])B", re.search("memory .*", shown)[0])
    gigabytes = [float(number) / {"M": 1000, "G": 1}[prefix] for number, prefix in (total, *parts)]
    assert gigabytes[0] == pytest.approx(sum(gigabytes[1:]), rel=0.01) and len(parts) == 6
    assert "fits           yes, in 90% of the 80GB of each h100; 96 devices are enough" in shown
    assert "checkpoint     2.1TB" in shown and "sequences of a step" not in shown
    shown = stage_runner(train, "gpt3_175b", *flags, "--devices=1000")
    assert "1,000 devices can't divide the 1,536 sequences of a step equally" in shown
    assert "fits           no" in stage_runner(train, "gpt3_175b", *flags, "--devices=8")
    assert "memory         " in plan("--parallel=fsdp") and "fits" not in plan("--parallel=fsdp")


def test_very_many_epochs_get_a_warning_whose_flag_leaves_twenty(plan):
    assert "warning" not in plan("--max_iters=100")
    shown = plan("--max_iters=1000000")
    epochs, mend = re.search(r"warning +([\d,]+) passes over .*?(--max_iters=\d+)", shown).groups()
    assert int(epochs.replace(",", "")) == round(1_000_000 * 4 * 16 / len(TEXT))
    shown = plan(mend)
    assert "warning" not in shown and re.search(r": 20(\.\d)? epochs of", shown)


def test_more_memory_than_the_device_has_gets_a_warning(plan, monkeypatch):
    monkeypatch.setattr("gpt_arc.training.plan.memory_of", lambda device: 4000)
    advice = "a smaller model or a smaller --batch_size or --activation_checkpointing takes less"
    assert re.search(rf"memory .*\nwarning +the device has \S+ of memory: {advice}", plan())


def test_the_memory_of_a_named_accelerator_is_compared_and_not_this_machine_s(plan, stage_runner, monkeypatch):
    monkeypatch.setattr("gpt_arc.training.plan.memory_of", lambda device: 4000)
    assert "warning" not in plan("--accelerator=h100")
    flags = "--dry_run", "--device=cpu", "--dataset=none", "--accelerator=T4"
    memory = r"memory +about ([\d.]+)GB on each device"
    shown = stage_runner(train, "gpt3_2.7b", *flags)
    needed = float(re.search(memory, shown)[1])
    assert needed > 16 * 2.6  # weights, gradients and two moments of float32
    averaged = float(re.search(memory, stage_runner(train, "gpt3_2.7b", *flags, "--ema_decay=0.9"))[1])
    assert averaged == pytest.approx(needed + 4 * 2.65, rel=0.01)
    assert "\nwarning        the T4 has 16GB of memory: a smaller model or " in shown and "fsdp" not in shown
    assert "or --parallel=fsdp takes less" in stage_runner(train, "gpt3_2.7b", *flags, "--devices=8")
    assert "memory: " not in stage_runner(train, "gpt2", *flags, "--batch_size=1")


def test_the_readme_states_the_planned_memory(stage_runner, workplace):
    text = (ROOT / "README.md").read_text().partition("## Presets")[2]
    rows = re.findall(r"^\| (`[^|]+) \|[^|]+\|[^|]+\| ([\d.]+ [MG]B[^|]*) \|", text, re.MULTILINE)
    stated = {
        name.strip("`"): memory for names, each in rows for name, memory in zip(names.split(", "), each.split(", "))
    }
    assert len(stated) == 10
    for name, memory in stated.items():
        shown = stage_runner(train, name, "--dry_run", "--accelerator=h100", "--device=cpu", "--dataset=none")
        number, unit = re.search(r"memory +about ([\d.]+)([MG]B)", shown).groups()
        factor = {"MB": 1, "GB": 1000}
        size, stated_unit = memory.split()
        assert float(number) * factor[unit] == pytest.approx(float(size) * factor[stated_unit], rel=0.1), name


def test_a_dry_run_compares_the_tokenizers_of_model_and_dataset(plan, stage_runner, tmp_path):
    tokenizer = CharTokenizer("".join(sorted(set(TEXT), reverse=True)))  # as many tokens, in another order
    write_dataset(tmp_path / "data" / "other", tokenizer, dict.fromkeys(("train", "val"), tokenizer.encode(TEXT)))
    stage_runner(train, "sums.toml", *TINY_FLAGS, "--out_dir=run", "--max_iters=1", "--warmup_iters=0")
    for flag in ("--resume=run", "--init_from=run"):
        for dataset, refused in (("sums", False), ("other", True)):
            shown = stage_runner(train, "sums.toml", *TINY_FLAGS, flag, f"--dataset={dataset}", "--dry_run")
            assert ("the dataset has another tokenizer than run" in getattr(shown, "message", "")) == refused


def test_a_dry_run_refuses_what_the_run_refuses(plan, stage_runner, tmp_path):
    flags = "sums.toml", *TINY_FLAGS, "--max_iters=1", "--warmup_iters=0"
    stage_runner(train, *flags, "--out_dir=base")
    for name in ("flipped", "edited", "renamed"):
        shutil.copytree(tmp_path / "base" / "last", tmp_path / name)
        (tmp_path / name / "manifest.json").unlink()
    content = bytearray((tmp_path / "flipped" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "flipped" / "model.safetensors").write_bytes(content)
    shutil.copy(tmp_path / "base" / "last" / "manifest.json", tmp_path / "flipped")
    tensors = load_file(tmp_path / "renamed" / "model.safetensors")
    tensors["lstm.weight_ih_l0"] = tensors.pop("final_norm.weight")
    save_file(tensors, tmp_path / "renamed" / "model.safetensors")
    config = read_json(tmp_path / "edited" / "config.json")
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config | {"mlp_size": 60}))
    expected = {
        "--init_from=flipped": "has other contents than manifest.json",
        "--init_from=edited": "has the shape",
        "--init_from=base/last --n_layer=3": "base/last has n_layer = 2, which --n_layer=3 can't change: leave it out",
        "--init_from=renamed": "is a classifier with an LSTM",
        "--out_dir=base": "resume it with --resume=base",
        "--out_dir=sums.toml/a/b": "a file is in the way",
        "--sample_start=€": "'€'",
        "--flash_attention=3": "is for GPUs of compute capability 9, such as the H100",
        "--float8": "is for GPUs of compute capability 8.9 or more",
        "--residual=bfloat16 --dtype=float32": "and these are in float32: use --dtype=bfloat16",
    }
    for flag, sentence in expected.items():
        refusals = [
            stage_runner(train, *flags, *flag.split(), "--sample_interval=1", *dry) for dry in ([], ["--dry_run"])
        ]
        assert [refused.code for refused in refusals] == [2, 2], flag
        assert sentence in refusals[0].message and refusals[0].message == refusals[1].message
    for flag in ("--out_dir=new", "--out_dir=base --overwrite"):
        assert "device         cpu" in stage_runner(train, *flags, *flag.split(), "--dry_run")
    assert not (tmp_path / "new").exists() and list((tmp_path / "base").glob("step-*"))


def test_the_mend_of_a_residual_stream_in_16_bits_works(plan, stage_runner):
    flags = "sums.toml", *TINY_FLAGS, "--max_iters=1", "--warmup_iters=0", "--residual=bfloat16"
    assert "use --dtype=bfloat16" in stage_runner(train, *flags, "--dtype=float32").message
    assert "val loss" in stage_runner(train, *flags, "--dtype=bfloat16")


def test_an_accelerator_s_plan_has_its_types(plan):
    flags = "--dry_run", "--accelerator=h100", "--residual=bfloat16"
    assert "\ndevice         h100, bfloat16\n" in plan(*flags, "--float8")
    assert "\ndevice         h100, tf32\n" in plan("--dry_run", "--accelerator=h100", "--dtype=tf32")
    for name, dtype in (("v100", "float16"), ("T4", "float16"), ("a100", "bfloat16")):
        assert f"\ndevice         {name}, {dtype}\n" in plan(f"--accelerator={name}")


def test_the_days_of_an_accelerator_are_those_of_the_precision(plan):
    """H100 SXM: 989 TFLOP/s in bfloat16 and 67 in float32; a V100 has no bfloat16."""
    days = {}
    for dtype in ("bfloat16", "float16", "tf32", "float32"):
        shown = plan("--accelerator=h100", f"--dtype={dtype}", "--max_iters=10000")
        days[dtype] = float(re.search(r"FLOPs: (\S+) days", shown)[1])
    assert days["float16"] == days["bfloat16"]
    assert days["tf32"] == pytest.approx(days["bfloat16"] * 2, rel=0.01)
    assert days["float32"] == pytest.approx(days["bfloat16"] * 989 / 67, rel=0.01)
    shown = plan("--accelerator=v100", "--dtype=bfloat16")
    assert re.search(r"\ncost +\S+ FLOPs: the peak of the v100 in bfloat16 isn't known\n", shown)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--accelerator=a100 --float8", "float8 = true is for .* and the device is a100: use (--float8=False)"),
        ("--accelerator=a100 --flash_attention=3", "flash_attention = 3 .* is a100: use (--flash_attention=2)"),
        ("--accelerator=a100 --flash_attention=4", "flash_attention = 4 .* is a100: use (--flash_attention=2)"),
        ("--accelerator=h100 --flash_attention=3 --dtype=float32", "are in float32: use (--dtype=bfloat16) or"),
        ("--accelerator=h100 --compile=graphs --devices=4", "one GPU, not for 4 x h100: use (--compile=True)"),
        ("--accelerator=h100 --parallel=fsdp --replicas=2", "devices = 1: plan for (--devices=2), or set replicas = 1"),
    ],
)
def test_settings_are_judged_by_the_accelerator_that_a_dry_run_plans_for(plan, flags, sentence):
    refused = plan(*flags.split())
    assert refused.code == 2 and re.search(sentence, refused.message)
    assert "\ndevice         " in plan(*flags.split(), re.search(sentence, refused.message)[1])


@pytest.mark.parametrize("flag", ["--compile=graphs", "--flash_attention=3", "--flash_attention=4", "--float8"])
def test_what_an_accelerator_has_is_not_looked_for_on_this_machine(plan, flag):
    assert "\ndevice         h100, bfloat16\n" in plan("--accelerator=h100", flag)


def test_an_unknown_accelerator_is_refused_before_a_line_of_the_plan(plan):
    refused = plan("--accelerator=h1")
    assert refused.code == 2 and "accelerator = h1 is not known: name one of h200" in refused.message
    assert refused.output == ""


def test_replicas_in_one_process_are_refused_with_a_mend(plan):
    refused = plan("--parallel=fsdp", "--replicas=2")
    assert refused.code == 2 and "replicas = 2 does not divide the number of processes, 1" in refused.message
    assert "or set replicas = 1" in refused.message
    assert "device         cpu" in plan("--parallel=fsdp", "--replicas=1")


def test_a_plan_says_that_a_cpu_has_nothing_to_offload(plan):
    line = "\nsettings       offload_optimizer has no effect on a CPU, whose memory holds the moments anyway\n"
    assert line in plan("--offload_optimizer") and line not in plan()
    assert line not in plan("--offload_optimizer", "--accelerator=h100")


def test_a_cpu_run_that_is_planned_for_a_gpu_gets_the_gpu_s_type(plan, stage_runner):
    stage_runner(train, "sums.toml", *TINY_FLAGS, "--out_dir=run", "--max_iters=1", "--warmup_iters=0")
    for name, dtype in (("h100", "bfloat16"), ("t4", "float16")):
        shown = stage_runner(train, "--resume=run", "--dry_run", f"--accelerator={name}")
        assert f"\ndevice         {name}, {dtype}\n" in shown


def test_a_flag_for_the_batch_replaces_the_other_one_in_a_file(plan, tmp_path):
    (tmp_path / "large.toml").write_text("tokens_per_step = 640")
    shown = plan("large.toml")
    assert "tokens a step  640 = 1 x 10 batches of 4 x 16" in shown and "replaces" not in shown
    shown = plan("large.toml", "--gradient_accumulation_steps=2")
    assert "tokens a step  128 = 1 x 2 batches of 4 x 16" in shown
    replaced = "settings       gradient_accumulation_steps replaces tokens_per_step, which large.toml sets\n"
    assert replaced in shown
    launch = read_command_line(["sums.toml", "large.toml", "--gradient_accumulation_steps=2"], None)
    assert launch.name == "large"  # the run's, not the replaced setting's
    (tmp_path / "steps.toml").write_text("gradient_accumulation_steps = 3")
    assert "tokens a step  640 = 1 x 10 batches of 4 x 16" in plan("steps.toml", "--tokens_per_step=640")


def test_several_files_are_named_in_the_order_in_which_they_win(plan, tmp_path):
    (tmp_path / "more.toml").write_text("n_layer = 3")
    assert "settings       of sums.toml, then more.toml, which wins" in plan("more.toml")
    assert "settings " not in plan()


def test_a_file_that_is_named_twice_counts_where_it_is_named_last(plan, tmp_path):
    shown = plan("sums.toml")
    assert re.findall("settings .*", shown) == ["settings       of sums.toml, which is named 2 times"]
    (tmp_path / "more.toml").write_text('dataset = "others"')
    shown = plan("more.toml", "sums.toml")
    assert "settings       of more.toml, then sums.toml, which wins" in shown and "100.0% sums" in shown


@pytest.mark.parametrize("flags, mends", [
    (["quickstart"], "as a qwen3: --activation=swiglu"),
    (["speedrun"], "as a gpt2: --positions=learned --qk_norm=False"),
    (["speedrun_cpu"], "as a gpt2: --ngrams=1"),
    (["char_tiny"], "as a gpt2: --head_bias=False"),
    (["moe_mini"], "as a mixtral: --activation=swiglu"),
    (["moe", "--experts_per_token=1"], "as a mixtral: --experts_per_token=2"),
    (["gpt2", "--attention_band=5", "--n_kv_head=4"], "as a gpt2: --n_kv_head=None --attention_band=None"),
])  # fmt: skip
def test_a_model_that_has_no_export_is_named_with_the_flags_that_give_it_one(plan, stage_runner, flags, mends):
    shown = stage_runner(train, *flags, "--dataset=sums", "--dry_run", "--device=cpu")
    line = re.search(r"\nexport         not to transformers, except (as a \S+: (.*))\n", shown)
    assert line[1] == mends
    files = [flag for flag in flags if not flag.startswith("--")]
    assert "export" not in stage_runner(train, *files, "--dataset=sums", "--dry_run", "--device=cpu", *line[2].split())


def test_a_model_that_can_be_exported_gets_no_line(plan, stage_runner):
    for preset in ("gpt2", "gpt1", "modern", "moe", "tinyshakespeare"):
        assert "export" not in stage_runner(train, preset, "--dataset=sums", "--dry_run", "--device=cpu")
