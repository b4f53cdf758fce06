"""The console command gpt-arc, from a clone and from an installed wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpt_arc import cli, distributed, extras, files
from gpt_arc.errors import UserError
from gpt_arc.files import resource
from helpers import ROOT


def gpt_arc(*arguments, python=sys.executable, **environment):
    return subprocess.run(
        [python, "-m", "gpt_arc.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_every_command_has_a_script_and_is_in_the_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpt-arc", "--help"])
    assert cli.run() is None
    output = capsys.readouterr().out
    for name, (script, _) in cli.COMMANDS.items():
        assert f"\n  {name} " in output
        assert resource(script).exists()
    assert f"configs: {ROOT / 'configs'}" in output


@pytest.mark.parametrize(
    "line, completions",
    [
        ("gpt-arc tr", ["train", "translate"]),
        ("gpt-arc prepare to", ["tokenizer"]),
        ("gpt-arc train quickstart --n_l", ["--n_layer"]),
        ("gpt-arc train --schedule=co", ["--schedule=cosine", "--schedule=constant"]),
        ("gpt-arc scaling plan --d", ["--days", "--devices"]),
        ("gpt-arc chat out/sft --json ", ["True", "False"]),
        ("gpt-arc sft con", ["configs/"]),
        ("gpt-arc trian ", []),
    ],
)
def test_a_shell_completes_commands_flags_values_and_files(line, completions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    answer = tmp_path / "answer"
    variables = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_IFS": "\n"}
    gpt_arc(_ARGCOMPLETE="1", _ARGCOMPLETE_STDOUT_FILENAME=str(answer), **variables)
    found = answer.read_text().splitlines() if answer.exists() else []
    assert sorted(name.rstrip() for name in found) == sorted(completions)  # a space follows the only one


def test_no_arguments_show_the_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpt-arc"])
    assert cli.run() is None
    assert capsys.readouterr().out.startswith("usage: gpt-arc COMMAND")


@pytest.mark.parametrize(
    "name, arguments, expected",
    [
        ("train", ["mine.toml", "--seed=1"], ["train.py", "mine.toml", "--seed=1"]),
        ("new", ["book.txt"], ["new.py", "book.txt"]),
        ("sft", ["out/gpt2"], ["stages/sft.py", "out/gpt2"]),
        ("expert-use", [], ["tools/expert_use.py"]),
        ("long-context", ["out/gpt2"], ["tools/long_context.py", "out/gpt2"]),
        ("chat", ["out/sft", "--seed=1"], ["sample.py", "--chat", "out/sft", "--seed=1"]),
        ("chat", ["--help"], ["sample.py", "--help"]),
        ("prepare", ["text", "--name", "book"], ["prepare/text.py", "--name", "book"]),
        ("bench", ["train", "--help"], ["tools/bench.py", "train", "--help"]),
    ],
)
def test_a_command_becomes_a_script_and_its_arguments(name, arguments, expected):
    script, *script_arguments = expected
    assert cli.script_command(name, arguments) == [str(ROOT / script), *script_arguments]


def test_a_config_missing_from_the_current_folder_is_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = str(ROOT / "configs" / "quickstart.toml")
    assert cli.with_packaged_configs(["configs/quickstart.toml", "--seed=1"]) == [packaged, "--seed=1"]
    assert cli.with_packaged_configs(["configs/missing.toml"]) == ["configs/missing.toml"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.toml").touch()
    assert cli.with_packaged_configs(["configs/quickstart.toml"]) == ["configs/quickstart.toml"]


def test_an_unknown_command_or_dataset_is_refused_with_a_list():
    with pytest.raises(UserError, match="no command 'trian'; the commands are new, train, sample, chat"):
        cli.script_command("trian", [])
    for arguments in ([], ["novels"]):
        with pytest.raises(UserError, match="name what to prepare: gpt-arc prepare decontaminate, digits, fineweb"):
            cli.script_command("prepare", arguments)


def test_messages_name_commands_that_a_wheel_has(tmp_path, monkeypatch):
    """A wheel has no train.py in the current folder; its scripts are in gpt_arc/resources."""
    resume = ("--resume=out/x y",)
    assert files.command("stages/sft.py", *resume) == "python stages/sft.py '--resume=out/x y'"
    monkeypatch.setattr(files, "PACKAGE", tmp_path)
    (tmp_path / "resources").mkdir()
    for name, (script, _) in cli.COMMANDS.items():
        if name not in ("chat", "prepare"):
            assert files.command(script, *resume) == f"gpt-arc {name} '--resume=out/x y'"
    assert files.command(str(tmp_path / "prepare" / "python_manual.py")) == "gpt-arc prepare python_manual"
    config = str(tmp_path / "resources/configs/gpt2.toml")
    assert files.command("train.py", config, *resume) == "gpt-arc train configs/gpt2.toml '--resume=out/x y'"
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    launched = "torchrun --standalone --nproc_per_node=2 --no-python gpt-arc train --seed=1"
    assert distributed.launch_command("train.py", "--seed=1") == launched


def test_the_command_that_installs_an_extra_suits_the_installation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("plot") == f"pip install -e '{ROOT}[plot]'"
    monkeypatch.chdir(ROOT)
    assert extras.install_command("plot") == "pip install -e '.[plot]'"
    monkeypatch.setattr(extras, "PACKAGE", tmp_path)
    (tmp_path / "resources").mkdir()
    assert extras.install_command("plot") == "pip install 'gpt-arc[plot]'"


def test_messages_name_a_script_as_it_is_typed_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.command(str(tmp_path / "train.py"), "--seed=1") == "python train.py --seed=1"
    assert files.command("/elsewhere/train.py") == "python /elsewhere/train.py"


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("bench", "name a benchmark: gpt-arc bench sample, train"),
        pytest.param("sft", "name a model to start from: gpt-arc sft MODEL", marks=pytest.mark.slow),  # imports torch
    ],
)
def test_messages_to_who_typed_gpt_arc_name_its_commands(tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    shown = gpt_arc(name)
    assert shown.returncode == 2 and sentence in shown.stderr


def test_the_script_runs_in_the_current_folder_with_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = gpt_arc("sample", "--help")
    assert shown.returncode == 0 and "--max_new_tokens" in shown.stdout
    refused = gpt_arc("sample", "--max_new_token=1")
    assert refused.returncode == 2 and "did you mean --max_new_tokens?" in refused.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the tracked files, built with the installed setuptools."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=folder / "source", capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_only_the_package_and_the_model_at_its_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"gpt_arc", "model.py"}
    assert "gpt_arc/py.typed" in names
    for folder in ("configs", "tasks", "stages", "prepare", "tools"):
        for path in (ROOT / folder).rglob("*.[tp]*[ly]"):
            assert f"gpt_arc/resources/{path.relative_to(ROOT)}" in names
    assert not [name for name in names if "test" in name or "__pycache__" in name]


@pytest.mark.slow
def test_the_wheel_works_outside_the_clone(wheel, tmp_path, monkeypatch):
    """A .pth file lends the installed libraries to a fresh environment, without this clone's editable install."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    subprocess.run([sys.executable, "-m", "venv", "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    places = [path for path in sys.path if path.endswith("site-packages")]
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text("\n".join(places))

    def run(*arguments):
        command = [tmp_path / "venv" / "bin" / "gpt-arc", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    code = "import gpt_arc.evaluation.tasks as t, model; t.load_task('lambada'); print(t.__file__, model.__file__)"
    modules = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.split()
    assert len(modules) == 2 and all(Path(module).is_relative_to(site) for module in modules)
    for name in ("new", "train", "sample", "stages", "prepare", "tools", "benchmarks"):
        absent = subprocess.run([python, "-I", "-c", f"import {name}"], capture_output=True, text=True)
        assert "ModuleNotFoundError" in absent.stderr

    assert str(site / "gpt_arc" / "resources" / "configs") in run("--help")
    assert "parameters" in run("train", "configs/quickstart.toml", "--dry_run=True")
    assert "--max_new_tokens" in run("sample", "--help")
    assert "--tasks" in run("eval", "--help")
    assert "speedrun" in run("bench", "--help")
    assert "start one with: gpt-arc train configs/quickstart.toml" in run("runs")
    tiny = "--n_layer=1 --n_embd=16 --n_head=2 --max_iters=2 --eval_iters=1 --compile=False --device=cpu".split()
    run("train", "configs/quickstart.toml", *tiny)  # prepares its dataset with a packaged script
    assert (tmp_path / "data" / "python_manual" / "meta.json").exists()
    run("sample", "--max_new_tokens=5", "--device=cpu")
    run("eval", "out/quickstart", "--perplexity", "python_manual", "--tasks", "addition_2", "--limit=2", "--device=cpu")
    (tmp_path / "book.txt").write_text("".join(f"This is line {n} of a small book.\n" for n in range(2000)))
    shown = run("new", "book.txt", "--minutes=0.01")
    assert "  gpt-arc sample out/book\n" in shown and "  gpt-arc sft out/book --train=CHATS.jsonl\n" in shown
    assert all(name in run("runs") for name in ("quickstart", "book"))
