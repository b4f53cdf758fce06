"""Completion of gpt-arc's commands, flags and values in a shell, by argcomplete.

    eval "$(register-python-argcomplete gpt-arc)"       # in ~/.bashrc or ~/.zshrc

At each Tab the shell runs gpt-arc with its question in environment variables.
"""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence

ASKED = "_ARGCOMPLETE" in os.environ


def words_before_cursor() -> list[str]:
    """Returns the complete words of the line, the first of which is gpt-arc."""
    from argcomplete.lexers import split_line

    return split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]


def answer_names(names: Iterable[str]) -> None:
    """Tells the shell which of `names` may stand at the cursor, and exits."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("name", choices=[*names])
    _answer(parser, [])


def answer_flags(
    parser: argparse.ArgumentParser, values: Mapping[argparse.Action, Sequence[str]], args: Sequence[str]
) -> None:
    """Tells the shell which flags of `parser`, values or files may follow `args`, and exits.

    `values` are those to choose among, by flag; where there are none, files are named.
    """
    from argcomplete.completers import ChoicesCompleter

    for action, choices in values.items():
        if choices:
            vars(action)["completer"] = ChoicesCompleter(dict.fromkeys(choices, ""))
    parser.add_argument("files", nargs="*")
    _answer(parser, args)


def _answer(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    import argcomplete

    os.environ["_ARGCOMPLETE"] = str(len(words_before_cursor()) - len(args))  # where what `parser` reads begins
    argcomplete.autocomplete(parser)
