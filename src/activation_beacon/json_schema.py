"""JSON schemas as they come from anybody, checked before they are handed on: size, nesting, and what they refer to.

What makes grammars of schemas follows references by recursion, far enough to run out of stack; and a keyword with a value of
another kind than its own may be told of in full. So both are looked at here, without recursion.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from activation_beacon.errors import InputError

MOST_CHARS = 1_000_000
MOST_NESTED = 100  # lists and objects within one another
MOST_FOLLOWED = 500  # the same, where references are followed one after another

KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("pattern", "format", "$ref", "$id", "$anchor"), (str,)),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), (int,)),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), (int, float)),
    **dict.fromkeys(("required", "enum", "allOf", "anyOf", "oneOf", "prefixItems"), (list,)),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), (dict,)),
    "type": (str, list),
}
# What holds schemas by any name, and what holds no schemas.
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
VALUES = frozenset({"enum", "const", "default", "examples"})


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as JSON, without what only the maker of grammars would heed.

    Raises:
        InputError: if it is too large or too deep, refers too far, or has keywords of a wrong kind.
    """
    depths = _depths(schema)
    if depths[id(schema)] > MOST_NESTED:
        raise refused(f"it is nested more than {MOST_NESTED} deep")
    try:
        text = json.dumps({name: value for name, value in schema.items() if name != "x-guidance"}, allow_nan=False)
        json.dumps(schema, ensure_ascii=False).encode()
    except ValueError as error:
        raise refused("it has numbers that are not finite, or half of a surrogate pair") from error
    if len(text) > MOST_CHARS:
        raise refused(f"it has more than {MOST_CHARS:,} characters")
    references = set()
    for part in _parts(schema):
        for name, kinds in KINDS.items():
            if name in part and (not isinstance(part[name], kinds) or isinstance(part[name], bool)):
                raise refused(f"{name} must be {' or '.join(kind.__name__ for kind in kinds)}")
        if "$ref" in part:
            references.add(part["$ref"])
    followed = sum(depths.get(id(_target(schema, reference)), 1) for reference in references)
    if depths[id(schema)] + followed > MOST_FOLLOWED:
        raise refused(f"what its {len(references):,} references lead to is nested more than {MOST_FOLLOWED} deep")
    return text


def refused(told: str, what: str = "served") -> InputError:
    """The error of a schema that cannot be served, or kept to."""
    return InputError(f"The JSON schema cannot be {what}: {told}. Change it, or leave it out.")


def _depths(schema: Mapping[str, Any]) -> dict[int, int]:
    """For each list and object of a schema, by its `id`, how many are within one another in it, itself included."""
    found: list[Any] = [schema]
    for each in found:  # it grows: whatever holds something stands before it
        found += _children(each)
    depths: dict[int, int] = {}
    for each in reversed(found):
        depths[id(each)] = 1 + max((depths[id(child)] for child in _children(each)), default=0)
    return depths


def _children(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, Mapping) else value
    return [child for child in inner if isinstance(child, Mapping | list)]


def _parts(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every schema within a schema, itself first."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, Mapping):
            yield part
            for name, value in part.items():
                if name in NAMED and isinstance(value, Mapping):
                    waiting += value.values()
                elif name not in VALUES:
                    waiting.append(value)


def _target(schema: Mapping[str, Any], reference: str) -> Any:
    """What a reference leads to; the whole schema where that is not a path in it."""
    found: Any = schema
    for name in reference.removeprefix("#").split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return schema
    return found
