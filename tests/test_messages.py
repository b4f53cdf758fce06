"""What messages advise can be done: the scripts and flags that they name exist, and their commands are understood."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from gpt_arc.data.datasets import prepare_dataset
from gpt_arc.data.prepare import dataset_directory
from gpt_arc.data.tokenizer import CharTokenizer, find_tokenizer
from gpt_arc.errors import UserError
from gpt_arc.flags import parse_flags
from gpt_arc.weights.directory import save_model
from helpers import ROOT
from model import GPT, GPTConfig
from prepare import text as prepare_text
from stages.scaling import ACTIONS
from test_docs import FENCE, PAGES

SCRIPTS = [path for folder in (".", "prepare", "stages", "tools") for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = [path for path in SCRIPTS if path.name not in ("model.py", "setup.py", "bench.py")]  # bench.py has commands
SOURCES = [*SCRIPTS, *sorted((ROOT / "gpt_arc").rglob("*.py"))]
FLAG = re.compile(r"(?<![-\w])--([a-z][\w-]*)")
COMMAND = re.compile(r"\bpython ((?:[a-z]+/)?[a-z]\w*\.py)([^`;]*)")
OF_TORCHRUN = {
    "standalone",
    "nnodes",
    "nproc_per_node",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
    "no-python",
    "help",
    "help-all",
    "help_all",
}
OF_OTHERS = OF_TORCHRUN | {"index-url"}


def texts(path, with_commands=True):
    """Every text in a module that isn't a docstring, with {} where a value is put in, and what `command` returns."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    skipped = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    skipped |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        id(node) for node in nodes if isinstance(node, ast.JoinedStr)
    }
    commands = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "command"]
    if with_commands:
        yield from (" ".join(["python", *map(written, call.args)]) for call in commands)
    skipped |= {id(part) for call in commands for part in ast.walk(call)}
    for node in nodes:
        is_text = isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in skipped:
            yield written(node)


def written(node):
    """The text of a node, with {} for what isn't constant."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(written, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


@pytest.fixture(scope="module")
def flags_of():
    """The flags of each script, from its --help-all, by path in the repository."""
    flags = {}
    commands = [(path,) for path in SCRIPTS] + [(ROOT / "stages" / "scaling.py", name) for name in ACTIONS]
    for path, *command in commands:
        screen, argv = io.StringIO(), sys.argv
        sys.argv = [str(path), *command, "--help-all"]
        try:
            with contextlib.redirect_stdout(screen), pytest.raises(SystemExit):
                runpy.run_path(str(path), run_name="__main__")
        finally:
            sys.argv = argv
        flags.setdefault(str(path.relative_to(ROOT)), set()).update(FLAG.findall(screen.getvalue()))
    return flags


def test_messages_name_flags_and_commands_that_exist(flags_of):
    anywhere = set().union(*flags_of.values()) | OF_OTHERS
    seen = 0
    for path in SOURCES:
        place = str(path.relative_to(ROOT))
        known = flags_of.get(place, anywhere) | OF_OTHERS
        for text in texts(path):
            commands = COMMAND.findall(text)
            for script, arguments in commands:
                assert (ROOT / script).is_file(), (place, text)
                assert set(FLAG.findall(arguments)) <= flags_of.get(script, anywhere) | OF_OTHERS, (place, text)
            others = set(FLAG.findall(COMMAND.sub("", text)))
            named = re.findall(r"[\w/]+\.py", text) + (["prepare/text.py"] if "prepare it" in text else [])
            allowed = known.union(*(flags_of.get(script, set()) for script in named))
            assert others <= allowed, (place, text)
            seen += len(commands) + len(others)
    assert seen > 60


def test_commands_in_messages_are_those_that_the_user_can_type():
    """`files.command` makes them, since a wheel has no scripts in the current folder."""
    for path in [*SOURCES, *(ROOT / "tools/benchmarks").glob("*.py")]:
        for text in texts(path, with_commands=False):
            assert not COMMAND.search(text), (path, text)


@pytest.mark.parametrize("name", ["/data/tokens.npy", "my text.txt", "../a/.hidden", "fineweb_of_mine"])
def test_the_command_that_prepares_a_missing_dataset_is_understood(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text("abc\n" * 100)
    with pytest.raises(UserError) as refusal:
        prepare_dataset(name)
    script, *arguments = shlex.split(re.search("`python (.*?)`", str(refusal.value))[1])
    assert script == "prepare/text.py"
    options = parse_flags(prepare_text.Options, None, arguments)
    assert options.input == ("my text.txt" if name == "my text.txt" else "FILE_OR_FOLDER",)
    dataset_directory(options.name)


def test_a_tokenizer_is_found_wherever_a_model_is(tmp_path, monkeypatch):
    """train.py advises `--tokenizer MODEL`, with the model that --init_from named."""
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer("abc")
    for place in ("out/t0/step-00000002", "out/t1/step-00000002", "model"):
        save_model(GPT(GPTConfig(4, 3, 1, 1, 4)), tokenizer, place)
    Path("out/t0/last").symlink_to("step-00000002")
    Path("out/t1/best").write_text("step-00000002")  # in place of a link, where there are none
    for name in ("out/t0", "out/t1", "out/t0/last", "out/t1/best", "model"):
        assert find_tokenizer(name) == tokenizer
    for place in (Path("data"), Path()):  # what replaced a folder was killed before the new one was there
        save_model(GPT(GPTConfig(4, 3, 1, 1, 4)), tokenizer, place / ".killed.old")
        assert find_tokenizer("killed") == tokenizer
        shutil.rmtree(place / ".killed.old")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documents_name_scripts_and_flags_that_exist(page, flags_of):
    if page.name == "CHANGELOG.md":
        return
    for language, block in FENCE.findall(page.read_text()):
        if language != "sh":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            scripts = [word for word in words if word in flags_of]
            for match in COMMAND.finditer(" ".join(words)):
                assert (ROOT / match[1]).exists(), line
            if len(scripts) == 1:
                assert set(FLAG.findall(" ".join(words))) <= flags_of[scripts[0]] | OF_OTHERS, line


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.sh")), ids=lambda path: path.name)
def test_shell_examples_name_scripts_and_flags_that_exist(path, flags_of):
    text = path.read_text().replace("\\\n", " ")
    called = re.findall(r'python "\$repository/([\w/$]+\.py)"(.*)', text)
    assert called
    for script, arguments in called:
        assert "$" in script or (ROOT / script).is_file(), script
        assert set(FLAG.findall(arguments)) <= flags_of.get(script, set(FLAG.findall(arguments))), arguments
