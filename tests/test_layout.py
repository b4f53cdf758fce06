"""Which package may import which, and what every script provides."""

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from gpt_arc.flags import reflowed
from helpers import ROOT

# Package -> the packages it may import besides itself. Read from top to bottom, this is the architecture: each line
# builds on the lines above it.
MAY_IMPORT = {
    "ground": (),
    "nn": (),
    "model": ("ground", "nn"),
    "data": ("ground", "nn"),
    "weights": ("ground", "nn", "model", "data"),
    "planning": ("ground", "nn", "model"),
    "training": ("ground", "nn", "model", "data", "weights", "planning"),
    "chat": ("ground", "nn", "model", "data", "weights"),
    "vision": ("ground", "nn", "model", "data", "weights", "chat"),
    "reports": ("ground", "nn", "model", "data", "weights", "planning", "training", "vision"),
    "finetuning": ("ground", "nn", "model", "data", "weights"),
    "decoding": ("ground", "nn", "model", "data", "weights", "training", "chat", "vision"),
    "serving": ("ground", "nn", "model", "data", "weights", "chat", "vision", "decoding"),
    "alignment": ("ground", "nn", "model", "data", "weights", "chat", "decoding"),
    "evaluation": ("ground", "nn", "model", "data", "weights", "chat", "vision", "decoding"),
}
ENTRY_POINTS = {"gpt_arc/cli.py", "gpt_arc/harness.py"}  # commands, above all packages
READS_THE_COMMAND_LINE = {"gpt_arc/errors.py", "gpt_arc/flags.py", *ENTRY_POINTS}
READS_THE_COMMAND_LINE |= {"gpt_arc/training/arguments.py", "gpt_arc/training/command_line.py"}
LIBRARY = [*sorted((ROOT / "gpt_arc").rglob("*.py")), ROOT / "model.py"]
FOLDERS = ("prepare", "stages", "tools")
AT_THE_ROOT = ("new", "train", "sample")
SCRIPTS = [ROOT / f"{name}.py" for name in AT_THE_ROOT]
SCRIPTS += [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
BENCHMARKS = [path for path in sorted((ROOT / "tools" / "benchmarks").glob("*.py")) if path.stem != "__init__"]
LONGEST_FUNCTION = 100


def place(path):
    return str(path.relative_to(ROOT))


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@functools.cache
def imported(path):
    """The modules that a file imports when it runs, at any depth."""
    names, nodes = set(), list(ast.walk(parsed(path)))
    conditions = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {node for condition in conditions for node in condition.body}
    for node in nodes:
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(path):
    return {name.split(".")[0] for name in imported(path)}


def package(module):
    """The line of MAY_IMPORT that a module belongs to, or None for other libraries."""
    top, *names = module.split(".")
    if module.startswith(("model", "gpt_arc.model_config")):
        return "model"
    if top != "gpt_arc" or not names:
        return None
    return names[0] if (ROOT / "gpt_arc" / names[0]).is_dir() else "ground"


@pytest.mark.parametrize("path", LIBRARY, ids=place)
def test_imports_point_one_way(path):
    if place(path) in ENTRY_POINTS:
        return
    name = package(".".join(path.relative_to(ROOT).with_suffix("").parts)) or "ground"
    imports = {package(module) for module in imported(path)} - {None, name}
    assert imports <= set(MAY_IMPORT[name]), f"{place(path)} imports {sorted(imports - set(MAY_IMPORT[name]))}"


def test_the_table_has_every_package_and_no_line_imports_a_later_one():
    folders = {path.name for path in (ROOT / "gpt_arc").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders | {"ground", "model"} == set(MAY_IMPORT)
    lines = list(MAY_IMPORT)
    for number, line in enumerate(lines):
        assert set(MAY_IMPORT[line]) <= set(lines[:number])


def test_the_architecture_documents_the_same_table():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `?(\w+)[^|]*\|[^|]*\| (nothing|ground|ground, [a-z, ]+) \|$", text, re.MULTILINE)
    documented = {name: () if imports == "nothing" else tuple(imports.split(", ")) for name, imports in rows}
    assert documented == MAY_IMPORT


def test_modules_have_no_import_cycles():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in LIBRARY}
    needs = {name: imported(path) & names.keys() - {name} for name, path in names.items() if name.count(".")}
    resolved = set()
    while len(resolved) < len(needs):
        ready = {name for name in needs.keys() - resolved if not (needs[name] & needs.keys()) - resolved}
        assert ready, f"an import cycle among {sorted(needs.keys() - resolved)}"
        resolved |= ready


def test_no_two_classes_have_one_name():
    """Except for the options of scripts."""
    scripts = [path for folder in (*FOLDERS, "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    paths = [*LIBRARY, *SCRIPTS[: len(AT_THE_ROOT)], *scripts]
    classes = Counter(node.name for path in paths for node in parsed(path).body if isinstance(node, ast.ClassDef))
    assert {name for name, count in classes.items() if count > 1} == {"Options"}


@pytest.mark.parametrize("path", sorted((ROOT / "gpt_arc" / "nn").glob("*.py")), ids=lambda path: path.stem)
def test_nn_modules_import_only_torch(path):
    assert top_level(path) <= {"torch", "gpt_arc", *sys.stdlib_module_names}


def test_what_windows_lacks_is_imported_where_it_may_be_missing():
    for path in LIBRARY + SCRIPTS:
        tree = parsed(path)
        tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
        guarded = {
            id(part)
            for node in tries
            if any("ImportError" in ast.unparse(handler) for handler in node.handlers)
            for part in node.body
        }
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import) and id(node) not in guarded]
        names = {alias.name for node in imports for alias in node.names}
        assert not names & {"fcntl", "pwd", "grp", "resource", "termios"}, place(path)


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS + BENCHMARKS, ids=place)
def test_no_script_is_imported(path):
    assert not top_level(path) & {*AT_THE_ROOT, *FOLDERS}


@pytest.mark.parametrize("path", LIBRARY, ids=place)
def test_only_entry_points_read_the_command_line(path):
    if place(path) not in READS_THE_COMMAND_LINE:
        text = path.read_text()
        assert not [word for word in ("sys.argv", "parse_flags", "runpy") if word in text]


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS + BENCHMARKS, ids=place)
def test_a_function_fits_on_two_screens(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name} has over {LONGEST_FUNCTION} lines"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_shadows_no_module(path):
    assert path.stem not in sys.stdlib_module_names
    libraries = {"datasets", "evaluate", "tokenizers", "transformers", "torch", "numpy", "tiktoken", "wandb"}
    assert path.stem not in libraries


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_s_docstring_says_how_to_run_it(path):
    docstring = ast.get_docstring(parsed(path))
    assert f"python {path.relative_to(ROOT)}" in docstring


MISTAKES = {
    "train.py --n_leyer=3": "there is no flag --n_leyer; did you mean --n_layer?",
    "stages/sft.py out/gpt2 --batch_size=0": "--batch_size = 0 must be at least 1",
    "stages/scaling.py plan --dais=2": "there is no flag --dais; did you mean --days?",
}
ACTIONS = ["stages/scaling.py plan", "tools/bench.py prepare"]
HELPS = {  # the first flag, and the groups after the most used flags
    "sample.py": ("start", ["other flags", "[sampling]"]),
    "train.py": ("dataset", [f"[{table}]" for table in ("model", "data", "training", "logging", "run")]),
    "stages/sft.py": ("train", ["other flags"]),
}
COMMANDS = [f"{place(path)} --help" for path in SCRIPTS] + [f"{script} --help-all" for script in HELPS]
COMMANDS += [f"{action} --help" for action in ACTIONS] + [*MISTAKES]
SLOW = {"datasets", "pyarrow", "scipy", "sklearn", "tiktoken", "tokenizers", "torch", "transformers", "wandb"}
FORKS = f"""
import atexit, gc, os, runpy, sys
import numpy, pydantic.dataclasses, tqdm, gpt_arc.manifest  # what most scripts import, once for them all
gc.freeze()  # otherwise a fork would visit all objects, and so copy their pages, when it ends
folder, *commands = sys.argv[1:]
for number, command in enumerate(commands):
    if not os.fork():
        for descriptor, name in ((1, "output"), (2, "errors")):
            os.dup2(os.open(f"{{folder}}/{{number}}.{{name}}", os.O_CREAT | os.O_WRONLY), descriptor)
        atexit.register(lambda: print("imported", sorted({SLOW} & sys.modules.keys())))
        sys.argv = command.split()
        path = os.path.join({str(ROOT)!r}, sys.argv[0])
        sys.path[0] = os.path.dirname(path)
        runpy.run_path(path, run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    with open(f"{{folder}}/{{number}}.code", "w") as file:
        print(code, file=file)
"""


class Outcome(NamedTuple):
    code: int
    output: str  # its last line lists the slow modules that were imported
    errors: str
    files: list[Path]  # left in the current folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcome of each of COMMANDS in an empty folder, in a fork of one process."""
    texts, empty = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-c", FORKS, texts, *COMMANDS], cwd=empty, check=True)
    return {
        command: Outcome(
            int((texts / f"{number}.code").read_text()),
            (texts / f"{number}.output").read_text(),
            (texts / f"{number}.errors").read_text(),
            list(empty.iterdir()),
        )
        for number, command in enumerate(COMMANDS)
    }


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_in_a_flag_is_refused_before_torch_is_imported(command, outcomes):
    script = command.split()[0].split("/")[-1]
    code, output, errors, _ = outcomes[command]
    assert (code, output, errors) == (2, "imported []\n", f"{script}: {MISTAKES[command]}\n")


@pytest.mark.parametrize("script", [place(path) for path in SCRIPTS])
def test_help_works_in_any_folder_and_imports_nothing_slow(script, outcomes):
    """The command line is read before what takes seconds to import."""
    code, output, errors, files = outcomes[f"{script} --help"]
    assert code == 0 and "--" in output and not errors, errors
    assert output.endswith("imported []\n"), output[-200:]
    assert not files


def flags_and_groups(shown):
    """The flags that a help text describes, and the titles of their groups."""
    assert max(len(line) for line in shown.splitlines() if not line.startswith("    python")) <= 80
    return re.findall(r"^  --(\w+) ", shown, re.MULTILINE), re.findall(r"^([\w\[][\w\] ]+):$", shown, re.MULTILINE)


@pytest.mark.parametrize("script", HELPS)
def test_help_shows_the_most_used_flags_and_help_all_each_once(script, outcomes):
    first, others = HELPS[script]
    shown = outcomes[f"{script} --help"].output
    most_used, groups = flags_and_groups(shown)
    assert most_used[0] == first and len(most_used) < 20 and groups == ["arguments", "most used flags"]
    more = re.search(rf"^(\d+) more flags are described by: python .*{script} --help-all$", shown, re.MULTILINE)[1]
    flags, groups = flags_and_groups(outcomes[f"{script} --help-all"].output)
    assert flags[: len(most_used)] == most_used and len(flags) == len(set(flags)) == len(most_used) + int(more)
    assert groups == ["arguments", "most used flags", *others]


@pytest.mark.parametrize("action", ACTIONS)
def test_the_help_of_an_action_names_it_in_its_usage(action, outcomes):
    assert outcomes[f"{action} --help"].output.splitlines()[0].endswith(f"{action} [--name=value ...]")


def test_descriptions_are_wrapped_and_commands_stay_whole():
    short, command, more = "    python a.py      short", "    python a.py " + "--c " * 9 + "--d", " " * 21 + "and more"
    text = f"{short}\n    python b.py      too long for its line\n{more}\n{command}"
    expected = [short, "    python b.py", "        too long for its line", more, command]
    assert reflowed(text, 36).splitlines() == expected
    listed = "Words and\nwords:\n- one item\n  of two lines\n  - another"
    assert reflowed(f"{listed}\n\nend", 14) == "Words and\nwords:\n- one item of\n  two lines\n- another\n\nend"


def test_a_run_is_planned_without_torch_s_compiler():
    """Its import takes as long as that of all the rest of torch."""
    code = "import sys, train; train.main(); print('torch._dynamo' in sys.modules)"
    flags = ["configs/char_tiny.toml", "--dry_run", "--dataset=none", "--device=cpu"]
    result = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("\nFalse\n"), result.stdout + result.stderr
