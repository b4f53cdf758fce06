"""Settings: strict pydantic dataclasses, and reading them from files and flags.

A settings dataclass declares its bounds in its types; `__post_init__` checks relations between settings only. Names are
unique within a dataclass and the dataclasses nested in it, so a flat name identifies a setting everywhere.

Four class attributes are optional. OLD maps former names to type hints; `translate(values)` converts their values to
current names. INSTEAD has pairs of settings that replace each other: the later one wins. LISTED says what lists the
settings instead of --help. FIRST names the most used settings, which --help shows; --help-all shows all.
"""

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import annotated_types
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from gpt_arc.errors import UserError
from gpt_arc.reading import read_toml

T = TypeVar("T")
VALUES = ConfigDict(strict=True, allow_inf_nan=False)
STRICT: ConfigDict = {**VALUES, "extra": "forbid", "use_attribute_docstrings": True}

LARGEST = 2**31 - 1  # of a count: beyond it a damaged file asks for more than any memory
Count = Annotated[int, Ge(1), Le(LARGEST)]
Threads = Annotated[int, Ge(1), Le(4096)]  # a process that starts more than the system has crashes
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Lt(2**63)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
UnitInterval = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]


def _writable(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it for the results")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the results: make it, or name another file")
    return path


def _picture(path: Path) -> Path:
    if path.suffix != ".png":
        raise ValueError(f"{path} must end in .png")
    return path


ResultFile = Annotated[Path, AfterValidator(_writable)]  # which hours of work will be written to
Picture = Annotated[ResultFile, AfterValidator(_picture)]
# settings by the names that other programs and our other scripts give them
ELSEWHERE = {
    **{"lr": "learning_rate", "max_lr": "learning_rate", "bs": "batch_size", "micro_batch_size": "batch_size"},
    **{"max_steps": "max_iters", "steps": "max_iters", "num_steps": "max_iters", "num_train_epochs": "epochs"},
    **{"context_length": "block_size", "max_seq_len": "block_size", "seq_len": "block_size", "wd": "weight_decay"},
    **{"n_layers": "n_layer", "num_layers": "n_layer", "n_heads": "n_head", "num_heads": "n_head", "dim": "n_embd"},
    **{"max_tokens": "max_new_tokens", "prompt": "start", "temp": "temperature", "warmup_steps": "warmup_iters"},
    **{"grad_accum_steps": "gradient_accumulation_steps", "output_dir": "out_dir", "num_beam": "num_beams"},
    **{"per_device_train_batch_size": "batch_size", "eval_steps": "eval_interval", "logging_steps": "log_interval"},
    **{"epochs": "max_iters", "num_epochs": "epochs", "max_iters": "epochs"},  # stages count epochs, train.py steps
    **{"warmup_iters": "warmup", "warmup_ratio": "warmup"},
}
NAMES = {  # one and several
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "truth values"),
    str: ("a text in quotes", "texts in quotes"),
    Path: ("a path in quotes", "paths in quotes"),
}
BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


POSITIONAL, HIDDEN = "positional", "hidden"
Positional = Annotated[T, POSITIONAL]  # on the command line, stands without its name
Hidden = Annotated[T, HIDDEN]  # has no flag


class Setting(NamedTuple):
    """One setting of a dataclass, or of a dataclass nested in it."""

    table: str | None  # the field that holds the nested dataclass
    hint: Any
    default: Any  # dataclasses.MISSING if there is none
    help: str


@functools.cache
def settings_in(cls: type) -> dict[str, Setting]:
    """The settings of `cls` by flat name."""
    settings: dict[str, Setting] = {}
    for field, hint in _fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if is_settings(hint):
            defaults = values_of(default) if is_settings(default) else {}
            for name, inner in settings_in(hint).items():
                settings[name] = inner._replace(
                    table=inner.table or field.name, default=defaults.get(name, inner.default)
                )
        else:
            settings[field.name] = Setting(None, hint, default, _help(cls, field.name))
    return settings


def _fields(cls: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Yields the fields of a dataclass and their types."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        yield field, hints[field.name]


def is_settings(hint: Any) -> bool:
    """Whether a type, or the type of a value, is a dataclass."""
    return dataclasses.is_dataclass(hint)


def _help(cls: type, name: str) -> str:
    """The text below a field, in the class or in a class that it extends."""
    for base in cls.__mro__:
        field = base.__dict__.get("__pydantic_fields__", {}).get(name)
        if field and field.description:
            return " ".join(field.description.split())
    return ""


def markers(hint: Any) -> tuple:
    """What `Positional` and `Hidden` add to a type."""
    return hint.__metadata__ if typing.get_origin(hint) is Annotated else ()


def values_of(settings: Any) -> dict[str, Any]:
    """The values of a settings dataclass by flat name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        values |= values_of(value) if is_settings(value) else {field.name: value}
    return values


def build(cls: type[T], values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> T:
    """Builds an instance of `cls` from values by flat name, with defaults for the rest.

    `sources` names the file that each value came from; a value without one came from a flag. Raises UserError.
    """
    sources = sources or {}
    values = getattr(cls, "translate", dict)(dict(values))
    arguments: dict[str, Any] = {}
    for field, hint in _fields(cls):
        if not is_settings(hint):
            arguments |= {field.name: values[field.name]} if field.name in values else {}
            continue
        inner = {name: values[name] for name in settings_in(hint) if name in values}
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        known = {one.name: getattr(default, one.name) for one in dataclasses.fields(hint)} if default else {}
        arguments[field.name] = build(hint, known | inner, sources)
    try:
        return cls(**arguments)
    except ValidationError as error:
        raise UserError(_refusal(error, cls, sources, values)) from None
    except (ValueError, OverflowError) as error:
        raise UserError(str(error)) from None


DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds_in(duration: str) -> int:
    """Returns the seconds in a duration such as 3h59m, 1d12h or 90s. Raises ValueError."""
    match = DURATION.fullmatch(duration)
    seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), (86_400, 3600, 60, 1))) if match else 0
    if not seconds:
        raise ValueError(f"{duration!r} is not a time such as 3h59m, 90m or 45s")
    return seconds


def mistake(error: Exception, cls: type) -> str:
    """Returns an error's message; for a ValidationError of `cls`, the first mistake in one sentence."""
    return _refusal(error, cls, None) if isinstance(error, ValidationError) else str(error)


def _refusal(
    error: ValidationError, cls: type, sources: Mapping[str, str] | None, values: Mapping[str, Any] | None = None
) -> str:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # settings contradict each other: name the files, and flags, that set those in the sentence
        sentence = _sentence(error, None, "")
        words = set(sentence.replace(",", " ").replace(":", " ").split())
        known, sources = settings_in(cls), sources or {}
        named = {name: value for name, value in (values or {}).items() if name in words}
        files = [sources[name] for name in named if name in sources]
        flags = [f"--{n}" for n, value in named.items() if n not in sources and value != known[n].default]
        return f"{', '.join(dict.fromkeys(files + flags))}: {sentence}" if files else sentence
    name = str(first["loc"][0])
    hint = settings_in(cls)[name].hint if name in settings_in(cls) else None
    is_flag = sources is not None and name not in sources
    sentence = _sentence(error, hint, f"--{name}" if is_flag else name)
    return f"{sources[name]}: {sentence}" if sources and name in sources else sentence


def read_value(cls: type, name: str, value: Any, source: str) -> Any:
    """Converts a plain `value` from a file to the type of setting `name` of `cls`. Raises UserError naming `source`."""
    hints = {known: setting.hint for known, setting in settings_in(cls).items()} | getattr(cls, "OLD", {})
    if name not in hints:
        raise UserError(f"{source}: there is no setting {name}{nearest(name, cls)}")
    if value == "None" and types.NoneType in dict(kinds_of(hints[name])):
        return None
    try:  # no setting takes a date, which JSON doesn't have
        content = json.dumps(value, default=lambda odd: {type(odd).__name__: str(odd)})
        return TypeAdapter(hints[name], config=VALUES).validate_json(content)
    except ValidationError as error:
        raise UserError(f"{source}: {_sentence(error, hints[name], name, located=False)}") from None


def read_text(hint: Any, name: str, text: str | list[str]) -> Any:
    """Converts the text of a flag, or the texts of a list, to the type of setting `name`. Raises UserError."""
    if isinstance(text, list):
        (inner,) = {typing.get_args(kind)[0] for kind, _ in kinds_of(hint) if typing.get_origin(kind) is tuple}
        return tuple(read_text(inner, name, one) for one in text)
    if text == "None" and types.NoneType in dict(kinds_of(hint)):
        return None
    if not text and (str not in dict(kinds_of(hint)) or types.NoneType in dict(kinds_of(hint))):
        raise UserError(f"--{name} is empty: give it a value, or leave it out")
    try:
        return TypeAdapter(hint, config=VALUES).validate_strings(text)
    except ValidationError as error:
        raise UserError(f"--{_sentence(error, hint, name, located=False, shown=str)}") from None


def nearest(name: str, cls: type, prefix: str = "") -> str:
    """Returns the end of a sentence that rejects `name`: the most similar setting, or its name here."""
    name, names = name.replace("-", "_"), settings_in(cls)
    elsewhere = ELSEWHERE.get(name, "")
    near = [known for known in (elsewhere, ELSEWHERE.get(elsewhere)) if known in names]
    near = near or difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    listed = "--help-all" if hasattr(cls, "FIRST") else "--help"
    return f"; {getattr(cls, 'LISTED', listed)} lists them all"


def read_file(cls: type, path: Path) -> dict[str, Any]:
    """Reads the settings of a TOML file by flat name, with or without the tables of `cls`. Raises UserError."""
    if not path.exists():
        names = [other.name for other in path.parent.glob("*.toml") if other.name != "pyproject.toml"]
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; configs/ has those that come with gpt-arc"
        raise UserError(f"there is no config file {path}{hint}")
    content = read_toml(path)
    known, settings = settings_in(cls), {}
    tables = list(dict.fromkeys(setting.table for setting in known.values() if setting.table))
    for key, value in content.items():
        is_table = bool(tables) and isinstance(value, dict)
        if is_table and key not in tables:
            raise UserError(f"{path}: there is no table [{key}]; the tables are [{'], ['.join(tables)}]")
        for name, entry in (value if is_table else {key: value}).items():
            checked = read_value(cls, name, entry, str(path))
            if is_table and known[name].table != key:
                raise UserError(f"{path}: {name} stands in [{key}] and belongs in [{known[name].table}]")
            if name in settings:
                raise UserError(f"{path}: {name} is set twice")
            settings[name] = checked
    return settings


def merge(cls: type, settings: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `settings` overridden by `later`, which also removes settings that INSTEAD pairs with it."""
    instead = getattr(cls, "INSTEAD", {})
    dropped = {other for name, other in instead.items() if name in later and other not in later}
    return {name: value for name, value in settings.items() if name not in dropped} | dict(later)


def read_files(cls: type, paths: typing.Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads the settings of several files, later ones winning, and the file that each came from."""
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for path in paths:
        later = read_file(cls, Path(path))
        settings = merge(cls, settings, later)
        sources |= dict.fromkeys(later, str(path))
    return settings, {name: source for name, source in sources.items() if name in settings}


def _sentence(
    error: ValidationError, hint: Any, name: str, located: bool = True, shown: Callable[[Any], str] | None = None
) -> str:
    """Describes the first mistake; `hint` is the type of setting `name`, with which locations begin if `located`."""
    errors = error.errors(include_url=False)
    first = errors[0]
    place = first["loc"][1:] if located else first["loc"]
    prefix = ""
    for step in place:
        kinds = [kind for kind, _ in kinds_of(hint)]
        entries = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple), None)
        values = next((typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict), None)
        nested = next((kind for kind in kinds if is_settings(kind)), None)
        if isinstance(step, int) and entries is not None:
            prefix, hint = f"number {step + 1} of {name}: ", entries
        elif isinstance(step, str) and values is not None:
            name, hint = f"{name}.{step}", values
        elif nested and isinstance(step, str):
            hint, name = settings_in(nested)[step].hint if step in settings_in(nested) else None, step
    if first["type"] == "value_error":
        sentence = str(first.get("ctx", {})["error"])
        return prefix + sentence if located else f"{name}: {sentence}"
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{prefix}{name} is missing"
    if hint is None:
        return f"{prefix}there is no setting {name}"
    name = "" if prefix and is_settings(hint) else f"{name} = "
    name = "" if prefix and isinstance(place[-1], int) else name
    expected = _expected(hint, {one["type"] for one in errors})
    return f"{prefix}{name}{(shown or _shown)(first['input'])} must be {expected}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return str(value)
    if is_settings(value):
        value = dataclasses.asdict(value)
    return str(value) if isinstance(value, Path) else json.dumps(value, default=str)


def kinds_of(hint: Any, bounds: tuple = ()) -> Iterator[tuple[Any, tuple]]:
    """Yields the types in a union, or the one type, each with its bounds."""
    if typing.get_origin(hint) is Annotated:
        own = tuple(one for one in hint.__metadata__ if isinstance(one, annotated_types.BaseMetadata))
        yield from kinds_of(hint.__origin__, own or bounds)
    elif typing.get_origin(hint) in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            yield from kinds_of(option, bounds)
    else:
        yield hint, bounds


def _expected(hint: Any, broken: set[str]) -> str:
    """Describes valid values of `hint`, given the kinds of rule that were `broken` (pydantic's error types)."""
    kinds = list(kinds_of(hint))
    ranges = [_range(bounds, broken) for _, bounds in kinds if bounds]
    finite = "finite" if "finite_number" in broken else ""
    if broken & BOUNDS:
        what = ", and ".join(filter(None, [*ranges[:1], finite]))
    else:
        what = " or ".join(_named(kind, bounds) for kind, bounds in kinds if kind is not types.NoneType)
    optional = types.NoneType in dict(kinds) and broken & BOUNDS
    return f"{what}, or left out" if optional else what


def _range(bounds: tuple, broken: set[str]) -> str:
    if not broken & {"less_than", "less_than_equal"}:
        bounds = tuple(bound for bound in bounds if bound != Le(LARGEST))  # it goes without saying
    least = next((bound for bound in bounds if isinstance(bound, (Ge, Gt))), None)
    most = next((bound for bound in bounds if isinstance(bound, (Le, Lt))), None)
    low = getattr(least, "ge", getattr(least, "gt", None))
    high = getattr(most, "le", getattr(most, "lt", None))
    shown = "2^63" if high == 2**63 else high
    if least and most and high != 2**63:
        excluded = [str(value) for value, open in ((low, isinstance(least, Gt)), (high, isinstance(most, Lt))) if open]
        return f"between {low} and {high}" + (f", {' and '.join(excluded)} excluded" if excluded else "")
    parts = [] if least is None else [f"more than {low}" if isinstance(least, Gt) else f"at least {low}"]
    parts += [] if most is None else [f"less than {shown}" if isinstance(most, Lt) else f"at most {shown}"]
    return " and ".join(parts)


def _named(kind: Any, bounds: tuple) -> str:
    if typing.get_origin(kind) is tuple:
        least = next((f"{bound.min_length} or more " for bound in bounds if isinstance(bound, MinLen)), "")
        inner = next(kinds_of(typing.get_args(kind)[0]))[0]
        if typing.get_origin(inner) is Literal:
            return f"a list of {least or 'any '}of {_choices(inner)}"
        return f"a list of {least}{_tables(inner) if is_settings(inner) else NAMES[inner][1]}"
    if typing.get_origin(kind) is Literal:
        return f"one of {_choices(kind)}" if len(typing.get_args(kind)) > 1 else _choices(kind)
    if typing.get_origin(kind) is dict:
        return "a table"
    if is_settings(kind):
        return _tables(kind)
    return NAMES[kind][0] + (" that isn't empty" if MinLen(1) in bounds else "")


def _choices(kind: Any) -> str:
    return ", ".join(f'"{option}"' for option in typing.get_args(kind))


def _tables(cls: type) -> str:
    return f"tables with {' and '.join(settings_in(cls))}"
