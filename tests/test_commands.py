"""Every command of README, docs and examples is run, shrunk, or listed with the reason why not."""

import re
import shutil

import pytest

from documented import BEFORE, NOT_RUN, SOURCES, Shell, commands_of, fill, reason_not_to_run
from helpers import ROOT
from test_docs import FENCE, PAGES

COMMANDS = {page: commands_of(page) for page in [*PAGES, *SOURCES] if page.name != "CHANGELOG.md"}
COMMANDS = {page: commands for page, commands in COMMANDS.items() if any(not reason_not_to_run(c) for c in commands)}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    return Shell(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, shell):
    folder = tmp_path_factory.mktemp("stand_ins")
    fill(folder, shell)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_document_run(page, shell, stand_ins, tmp_path):
    shutil.copytree(stand_ins, tmp_path, symlinks=True, dirs_exist_ok=True)
    commands = BEFORE.get(str(page.relative_to(ROOT)), []) + COMMANDS[page]
    commands = [command for command in commands if not reason_not_to_run(command)]
    for name in re.findall(r"--name[ =](\w+)", "\n".join(commands)):  # what the page makes isn't there yet
        (tmp_path / "clone/data" / name).unlink(missing_ok=True)
    failures = [failure for command in commands if (failure := shell.failure(command, tmp_path / "clone"))]
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_the_lines_of_python_run(stand_ins, monkeypatch):
    monkeypatch.chdir(stand_ins / "clone")
    blocks = [
        block for language, block in FENCE.findall((ROOT / "docs/guide/python.md").read_text()) if language == "python"
    ]
    exec("\n".join(blocks), names := {})
    length = len("The statement") - 1  # a token for each byte
    assert names["logits"].shape == (1, length, 257) and names["loss"].count == length


def test_reasons_belong_to_commands():
    commands = [re.sub(r"\s+# .*", "", c) for page in [*PAGES, *SOURCES] for c in commands_of(page)]
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for command in commands), pattern
