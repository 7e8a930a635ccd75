"""File formats shared between versions of the program: frozen dataclasses that are validated on reading."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.common.errors import UserError
from pipeline.common.files import FileError, check_regular

Contract = TypeVar("Contract")
Long = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""An integer that a database can hold."""
LARGEST = 2**26
"""Maximum size of a contract file, in bytes."""


def read_contract(kind: type[Contract], path: Path) -> Contract:
    """Read a contract from a JSON file; raises FileError, naming the file, if it is missing or damaged."""
    if check_regular(path).st_size > LARGEST:
        raise FileError(f"{path}: damaged: larger than {LARGEST:,} bytes")
    try:
        return parse_contract(kind, path.read_bytes(), path)
    except OSError as problem:
        raise FileError(f"{path}: {problem.strerror}") from problem


def parse_contract(
    kind: type[Contract], text: bytes | str, source: Path | str, error: type[UserError] = FileError
) -> Contract:
    """Parse a contract from JSON and check the type of every field; unknown fields of later versions are ignored.

    Raises `error`, naming `source` and the first invalid field.
    """
    try:
        return _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type]
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise error(f"{source}: damaged: {field}: {first['msg'][:160]}") from problem


def contract_of(kind: type[Contract], values: Any, source: Path | str, error: type[UserError] = FileError) -> Contract:
    """Build a contract from JSON-compatible values; raises `error` as `parse_contract` does."""
    return parse_contract(kind, json.dumps(values), source, error)


def to_values(contract: Any) -> dict[str, Any]:
    """A contract as JSON-compatible values, without fields that are None or an empty mapping."""
    return {key: value for key, value in asdict(contract).items() if value is not None and value != {}}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
