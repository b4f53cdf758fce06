"""Which settings have no docstring below them."""

import ast
import dataclasses
import inspect
import textwrap


def undocumented(cls: type) -> list[str]:
    """Names of the fields of `cls`, and of the dataclasses that it is made of, without a text on the next line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    documented = {
        here.target.id
        for here, after in zip(body, body[1:])
        if isinstance(here, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    missing = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            missing += undocumented(field.type)
        elif field.name not in documented:
            missing.append(f"{cls.__name__}.{field.name}")
    return missing
