"""Command lines, parsed by tyro, with each mistake explained in one sentence."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import annotated_types
import tyro

from gpt_arc.errors import UserError
from gpt_arc.settings import build, merge, read_value, settings_in, values_of

T = TypeVar("T")


def parse_flags(cls: type[T], description: str | None, args: list[str], default: T | None = None) -> T:
    """Builds the dataclass `cls` from flat `args`: --n_layer=6, --n-layer 6, --compile=False.

    `default` has the values of flags that are not given. Raises UserError; --help prints and exits.
    """
    if default is None:
        return build(cls, read_flags(cls, description, args, {}))
    values = values_of(default)
    return build(cls, merge(cls, values, read_flags(cls, description, args, values)))


def read_flags(cls: type, description: str | None, args: list[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of `cls` given in `args`, by flat name; --help and absent positionals use `defaults`.

    Checks only their types. Raises UserError; --help prints and exits.
    """
    old, args = _old_flags(cls, args) if hasattr(cls, "OLD") else ({}, args)
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            parsed, unknown = tyro.cli(
                _mirror(cls, defaults),
                description=description,
                args=args,
                return_unknown_args=True,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_unboxed(screen.getvalue())) from None
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"the argument {flag} is not understood: write --name=value")
        name = flag.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, (known for known in settings_in(cls) if known != name), n=1)
        raise UserError(f"there is no flag {flag}; " + (f"did you mean --{near[0]}?" if near else "--help lists them"))
    named = {arg.split("=")[0].lstrip("-").replace("-", "_") for arg in args if arg.startswith("--")}
    values = values_of(parsed)
    positional = {name for name, setting in settings_in(cls).items() if tyro.conf.Positional in _markers(setting.hint)}
    named |= {name for name in positional if name not in defaults or values[name] != defaults[name]}
    return {name: value for name, value in values.items() if name in named} | old


def _old_flags(cls: type, args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of flags with former names, and the other arguments."""
    old, others, rest = {}, [], iter(args)
    names = cls.OLD.keys() - settings_in(cls).keys()
    for arg in rest:
        name, given, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not arg.startswith("--") or name not in names:
            others.append(arg)
            continue
        value = value if given else next(rest, "")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        old[name] = read_value(cls, name, value, "the command line")
    return old, others


def _markers(hint: Any) -> tuple:
    return hint.__metadata__ if typing.get_origin(hint) is Annotated else ()


def _mirror(cls: type, defaults: Mapping[str, Any]) -> type:
    """Returns `cls` in a form for tyro: a plain dataclass without bounds, with help texts and `defaults`."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields: list[Any] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(hint):
            known = values_of(default) if dataclasses.is_dataclass(default) else {}
            inner = _mirror(hint, known | dict(defaults))
            fields.append((field.name, inner, dataclasses.MISSING))
        elif tyro.conf.Suppress not in _markers(hint):
            default = defaults.get(field.name, default)
            text = next((text for base in cls.__mro__ if (text := _help(base, field.name))), None)
            fields.append((field.name, Annotated[_unbounded(hint), tyro.conf.arg(help=text)], default))
    columns = [
        (n, hint) if d is dataclasses.MISSING else (n, hint, dataclasses.field(default=d)) for n, hint, d in fields
    ]
    namespace = {"__doc__": cls.__doc__} if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(") else {}
    return dataclasses.make_dataclass(cls.__name__, columns, frozen=True, kw_only=True, namespace=namespace)


def _help(cls: type, name: str) -> str | None:
    field = cls.__dict__.get("__pydantic_fields__", {}).get(name)
    return field.description if field else None


def _unbounded(hint: Any) -> Any:
    """Returns a type without its bounds."""
    if typing.get_origin(hint) is Annotated:
        inner = _unbounded(hint.__origin__)
        markers = tuple(one for one in hint.__metadata__ if not isinstance(one, annotated_types.BaseMetadata))
        return Annotated[(inner, *markers)] if markers else inner
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.Union[tuple(map(_unbounded, typing.get_args(hint)))]  # noqa: UP007  types known only at run time
    if typing.get_origin(hint) is tuple:
        return tuple[tuple(one if one is ... else _unbounded(one) for one in typing.get_args(hint))]
    return hint


def _unboxed(message: str) -> str:
    """Returns the first part of a message in tyro's box, as a sentence."""
    lines = [line.strip("\u2502| ") for line in message.splitlines()[1:]]
    border = set("\u2500\u256d\u256e\u256f\u2570-+")
    lines = list(itertools.dropwhile(lambda line: set(line) <= border, lines))
    end = next((i for i, line in enumerate(lines) if set(line) <= border), len(lines))
    words = re.sub(r"^Error parsing (?!--)[^:]*: ", "", " ".join(lines[:end]))  # a table's name doesn't help
    words = words.removeprefix("Error parsing ")
    if wrong := re.match(
        r"(--\S+): (?:no type matching|Could not find|invalid literal|could not convert).*?('.*')", words
    ):
        words = f"{wrong[1]}: {wrong[2]} is not understood"  # instead of Python's types and functions
    return words.rstrip(".") + "; --help lists the flags and their values"
