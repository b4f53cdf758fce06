"""Command lines: argparse takes them apart, and the types of the settings convert and check their values."""

import argparse
import dataclasses
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from gpt_arc import completion
from gpt_arc.errors import UserError
from gpt_arc.files import HELP, command
from gpt_arc.settings import (
    HIDDEN,
    POSITIONAL,
    Setting,
    build,
    kinds_of,
    markers,
    merge,
    nearest,
    read_text,
    settings_in,
    values_of,
)

T = TypeVar("T")
WIDTH = 100  # columns of a help text, at most
ARGUMENTS = "arguments"  # the title of what stands without a name
METAVARS = {int: "INT", float: "FLOAT", bool: "BOOL", Path: "PATH"}


def parse_flags(cls: type[T], description: str | None, args: list[str], default: T | None = None) -> T:
    """Builds the dataclass `cls` from flat `args`: --n_layer=6, --n-layer 6, --compile.

    `default` has the values of flags that are not given. Raises UserError; --help prints and exits.
    """
    if default is None:
        return build(cls, read_flags(cls, description, args, {}))
    values = values_of(default)
    return build(cls, merge(cls, values, read_flags(cls, description, args, values)))


def read_flags(cls: type, description: str | None, args: list[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of `cls` given in `args`, by flat name. `defaults` replace those of `cls`.

    A setting that is true or false may stand without a value, which means true. Raises UserError; --help and --help-all
    print and exit.
    """
    program = command_before(args)
    settings = {name: one for name, one in settings_in(cls).items() if HIDDEN not in markers(one.hint)}
    positionals = [name for name, one in settings.items() if POSITIONAL in markers(one.hint)]
    hints = getattr(cls, "OLD", {}) | {name: one.hint for name, one in settings.items()}
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    actions = {
        parser.add_argument(f"--{name}", nargs="*" if is_list(hints[name]) else None): hints[name]
        for name in hints.keys() - set(positionals)
    }
    if completion.ASKED:
        completion.answer_flags(parser, {action: choices_of(hint) for action, hint in actions.items()}, args)
    args = list(spelled_out(args, hints))
    if HELP & set(args):
        titles = groups_of(cls, settings, complete="--help_all" in args)
        print(help_text(settings, titles, program, description, defaults))
        raise SystemExit(0)
    parsed, others = parser.parse_known_args(args)
    texts: dict[str, Any] = vars(parsed)
    for flag in [other.split("=")[0] for other in others if other.startswith("-") and other != "-"]:
        if flag[2:].startswith("no_") and flag[5:] in hints:
            raise UserError(f"there is no flag {flag}; did you mean --{flag[5:]}=False?")
        if flag[2:] in positionals:
            raise UserError(f"there is no flag {flag}: write the {flag[2:]} first, without a name")
        raise UserError(f"there is no flag {flag}{nearest(flag.lstrip('-'), cls, '--')}")
    for name in positionals:
        if others:
            texts[name], others = (others, []) if is_list(hints[name]) else (others[0], others[1:])
    if others:
        raise UserError(f"the argument {others[0]} is not understood: write --name=value")
    for name, setting in settings.items():
        if setting.default is dataclasses.MISSING and not {name} & (texts.keys() | defaults.keys()):
            flag = name.upper() if name in positionals else f"--{name}"
            raise UserError(f"{flag} is missing: {setting.help or '--help lists the flags'}")
    return {name: read_text(hints[name], name, text) for name, text in texts.items()}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        raise UserError(f"{flag} needs a value: {flag}=VALUE" if problem.startswith("expected") else message)


def command_before(args: list[str]) -> str:
    """Returns the command that `args` follow: a script and, if it has several, its action."""
    words = len(sys.argv) - len(args) if sys.argv[-len(args) :] == args else 1
    return command(*sys.argv[:words])


def spelled_out(args: list[str], hints: Mapping[str, Any]) -> Iterator[str]:
    """Yields arguments with names in underscores, and with the value True for truth values that have none."""
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if not arg.startswith("--"):
            yield arg
            continue
        name = flag[2:].replace("-", "_")
        kinds = [kind for kind, _ in kinds_of(hints[name])] if name in hints else []
        following = args[i + 1].lower() if i + 1 < len(args) else ""
        options = {"true", "false", "1", "0", "none"} | {each for kind in kinds for each in get_args(kind)}
        if bool in kinds and str not in kinds and not equals and following not in options:
            equals, value = "=", "True"
        yield f"--{name}{equals}{value}"


def is_list(hint: Any) -> bool:
    return any(get_origin(kind) is tuple for kind, _ in kinds_of(hint))


def groups_of(cls: type, settings: Mapping[str, Setting], complete: bool) -> dict[str, str]:
    """Returns the flags that a help text shows, with the title of the group of each. `complete`: all of them."""
    most_used = {name: "most used flags" for name in getattr(cls, "FIRST", ()) if name in settings}
    first = {name: ARGUMENTS for name, one in settings.items() if POSITIONAL in markers(one.hint)} | most_used
    if most_used and not complete:
        return first
    other = "other flags" if most_used else "flags"
    return first | {name: f"[{one.table}]" if one.table else other for name, one in settings.items()} | first


def help_text(
    settings: Mapping[str, Setting],
    titles: Mapping[str, str],
    program: str,
    description: str | None,
    defaults: Mapping[str, Any],
) -> str:
    """Describes the flags in `titles`, which has the group of each, at most WIDTH columns wide."""
    width, left = help_width(), len(settings) - len(titles)
    usage = [program, *(name.upper() for name, title in titles.items() if title == ARGUMENTS), "[--name=value ...]"]
    parser = argparse.ArgumentParser(
        description=reflowed(description or "", width),
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width),
        usage=" ".join(usage).replace("%", "%%"),
        epilog=f"{left} more flags are described by: {program} --help-all" if left else None,
    )
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(titles.values())}
    for name, title in titles.items():
        setting = settings[name]
        default = defaults.get(name, setting.default)
        value = "required" if default is dataclasses.MISSING else f"default: {default_text(default)}"
        groups[title].add_argument(
            name if title == ARGUMENTS else f"--{name}",
            metavar=name.upper() if title == ARGUMENTS else metavar(setting.hint),
            help=f"{setting.help} ({value})".strip().replace("%", "%%"),
        )
    return parser.format_help()


def help_width() -> int:
    return max(40, min(WIDTH, shutil.get_terminal_size().columns))


def metavar(hint: Any) -> str:
    names = []
    for kind, _ in kinds_of(hint):
        if get_origin(kind) is tuple:
            names.append(f"{metavar(get_args(kind)[0])} ...")
        elif get_origin(kind) is Literal:
            names.append("{" + ",".join(map(str, get_args(kind))) + "}")
        elif kind is not types.NoneType:
            names.append(METAVARS.get(kind, "TEXT"))
    return "|".join(names)


def choices_of(hint: Any) -> list[str]:
    """Returns the values to choose among, if a setting has such."""
    kinds = [kind for kind, _ in kinds_of(hint)]
    literals = [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    return literals + ["True", "False"] * (bool in kinds)


def default_text(default: Any) -> str:
    return " ".join(map(str, default)) or "none" if isinstance(default, tuple) else str(default)


def reflowed(text: str, width: int) -> str:
    """Wraps paragraphs and lists, and puts comments below the commands that they don't fit beside."""
    paragraphs = (paragraph.strip("\n") for paragraph in text.split("\n\n"))
    return "\n\n".join(
        "\n".join(example(line, width) for line in p.splitlines()) if p.startswith(" ") else wrapped(p, width)
        for p in paragraphs
        if p
    )


def wrapped(paragraph: str, width: int) -> str:
    items = (" ".join(item.split()) for item in re.split(r"\n *(?=- )", paragraph))
    return "\n".join(textwrap.fill(item, width, subsequent_indent="  " * item.startswith("- ")) for item in items)


def example(line: str, width: int) -> str:
    """Returns an indented line, `command   comment`, or two if it is wider than `width`; a command stays whole."""
    command, *comment = re.split(r" {2,}", line.strip(), maxsplit=1)
    if line.startswith(" " * 9):  # more of the comment above
        command, comment = "", [line.strip()]
    if len(line) <= width or not comment:
        return line
    below = textwrap.fill(comment[0], width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"    {command}\n{below}" if command else below
