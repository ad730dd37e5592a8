"""What a setting is: its type, its range or choices, what it means and what it changes; and the line for what does not fit.

A group of settings is a frozen pydantic model. Its fields are all there is: checks, `--help`, defaults, a run's folder name
and what may differ when a run goes on are read from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo


def _finite(x: float) -> float:
    if not math.isfinite(x):
        raise ValueError("not finite")
    return x


Number = Annotated[int | float, AfterValidator(_finite)]
Positive = Annotated[int | float, Field(gt=0), AfterValidator(_finite)]
NotNegative = Annotated[int | float, Field(ge=0), AfterValidator(_finite)]
Count = Annotated[int, Field(ge=1)]  # at least 1
Whole = Annotated[int, Field(ge=0)]
Share = Annotated[int | float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """A group of settings. A field whose default is None may be given as null: then what its meaning says fills it in."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    by_file: ClassVar[bool] = False  # whether files of config/<group> have its defaults


Some = TypeVar("Some", bound=Settings)


def setting(default: Any, meaning: str, *, named: bool = True, may_differ: bool = False, inherited: bool = False) -> Any:
    """A field of a group.

    Args:
        meaning: in a line, for `--help`.
        named: a run's folder is named after it where it is not the default, for it changes the weights.
        may_differ: a run, or a folder of results, may be gone on with under another value.
        inherited: where it is not given it is as the run has it that is measured.
    """
    extra: dict[str, Any] = {"named": named, "may_differ": may_differ, "inherited": inherited}
    return Field(default, description=meaning, json_schema_extra=extra)


def fields(group: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each setting by its dotted key, groups' own within them."""
    for name, field in group.model_fields.items():
        inner = _group(field.annotation)
        if inner is not None and not inner.by_file:
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def of_groups(group: type[Settings]) -> Iterator[tuple[str, FieldInfo]]:
    """The settings, with a meaning, of the groups whose defaults files have, by their dotted keys."""
    for name, field in group.model_fields.items():
        inner = _group(field.annotation)
        if inner is not None and inner.by_file:
            yield from ((f"{name}.{key}", one) for key, one in inner.model_fields.items() if one.description)


def marked(group: type[Settings], mark: str, value: bool = True) -> set[str]:
    """The dotted keys of the settings with this mark (`named`, `may_differ`, `inherited`)."""
    return {key for key, field in fields(group) if dict(field.json_schema_extra or {}).get(mark) is value}  # type: ignore[arg-type]


def defaults(group: type[Settings]) -> dict[str, Any]:
    """The group's defaults, nested; those of groups by files are left out."""
    found: dict[str, Any] = {}
    for name, field in group.model_fields.items():
        inner = _group(field.annotation)
        if inner is None:
            found[name] = field.default
        elif not inner.by_file:
            found[name] = defaults(inner)
    return found


def what(field: FieldInfo) -> str:
    """What the field's value needs to be: "a whole number of at least 1", "one of a, b", ..."""
    if get_origin(field.annotation) is list:
        return _list(field.annotation)
    [kind, *others] = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not NoneType]
    metadata = [*field.metadata]
    while get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        metadata += [m for one in more for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
    if get_origin(field.annotation) is Literal or get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(field.annotation if get_origin(field.annotation) is Literal else kind)))}"
    if kind is bool:
        return "true or false"
    if get_origin(kind) is list or kind is list:
        return _list(kind)
    if get_origin(kind) is dict:
        return "a group of settings"
    if kind is str:
        return "a text"
    whole = kind is int and float not in get_args(field.annotation) and float not in get_args(kind)
    several = " or a list of such, [A,B,...]" if any(get_origin(_bare(other)) is list for other in others) else ""
    return f"a {'whole ' if whole else ''}number{_bounds(metadata)}{several}"


def _list(kind: Any) -> str:
    [item] = get_args(kind) or (Any,)
    numbers = "" if item in (Any, str) else f" of {what(FieldInfo.from_annotation(item)).removeprefix('a ')}"
    return f"a list{numbers.replace('number', 'numbers', 1)}, [A,B,...]"


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _bounds(metadata: list[Any]) -> str:
    low = next((f" above {m.gt:g}" for m in metadata if isinstance(m, Gt)), "")
    low = low or next((f" of at least {m.ge:g}" for m in metadata if isinstance(m, Ge)), "")
    high = next((f" and below {m.lt}" for m in metadata if isinstance(m, Lt)), "")
    return low + (high or next((f" and at most {m.le}" for m in metadata if isinstance(m, Le)), ""))


def _group(annotation: Any) -> type[Settings] | None:
    """The group that a field is; None of any other, also of groups by names (`dict[str, Group]`)."""
    if get_origin(annotation) is dict:
        return None
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, Settings)), None)


def parse(group: type[Some], given: Mapping[str, Any], name: str = "") -> Some:
    """The settings of what was given, nested, with all of the group's keys.

    Args:
        name: of the group, where it is one within others.

    Raises:
        ValueError: a key is unknown, or lacks, or a value does not fit: one line, with what would.
    """
    try:
        return group.model_validate(_without_nulls(group, given))
    except ValidationError as error:
        raise ValueError(_line(group, given, error, [name] if name else [])) from error


def check_value(key: str, value: Any, kind: Any) -> None:
    """Raises ValueError where a value is not of the kind, a type with its range."""
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        raise ValueError(f"{key}={value}: needs to be {what(FieldInfo.from_annotation(kind))}") from None


def _without_nulls(group: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, but for nulls where that is the default: they are filled in later."""
    found = {}
    for key, value in given.items():
        field = group.model_fields.get(key)
        inner = None if field is None else _group(field.annotation)
        if inner is not None and isinstance(value, Mapping):
            found[key] = _without_nulls(inner, value)
        elif value is not None or field is None or field.default is not None:
            found[key] = value
    return found


def _line(group: type[Settings], given: Any, error: ValidationError, keys: list[str]) -> str:
    """The line for the first key that is unknown, else for the first that lacks or whose value does not fit.

    Args:
        keys: that lead to the group.
    """
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    field, inner = FieldInfo.from_annotation(group), [group]  # of where the walk is: the last is the group that has the key
    for part in first["loc"]:
        if not isinstance(given, Mapping) or part not in given:
            break
        keys, given = [*keys, str(part)], given[part]
        field = _inside(field.annotation, str(part)) or FieldInfo.from_annotation(Any)
        inner += [] if (found := _group(field.annotation)) is None else [found]
    key = ".".join(keys)
    if first["type"] == "extra_forbidden":
        return unknown(key, list(inner[-1].model_fields))
    if first["type"] == "missing":
        return f"{key or 'the configuration'} lacks {first['loc'][-1]}; its keys are {', '.join(inner[-1].model_fields)}"
    if (of := _group(field.annotation)) is not None:
        return f"{key}={given}: is a group of settings, {', '.join(name for name, _ in fields(of, f'{key}.'))}"
    if field.annotation is Any:
        return f"{key}={given}: {first['msg']}"
    return f"{key}={given}: needs to be {what(field)}"


def _inside(kind: Any, part: str) -> FieldInfo | None:
    """The field of that name within a group, or groups by names; None where it has none."""
    if get_origin(kind) is dict:
        return FieldInfo.from_annotation(get_args(kind)[1])
    group = _group(kind)
    return None if group is None else group.model_fields.get(part)


def unknown(key: str, names: list[str]) -> str:
    """The line for a key that does not exist, with those that do beside it."""
    parent = key.rpartition(".")[0]
    return f"unknown key '{key}'; {parent or 'the configuration'} has {', '.join(names)}"


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings to {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
