"""Read pipeline YAMLs. A wrong one names the file, line, key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from airloom.errors import ConfigError
from airloom.spec.pipeline import PipelineSpec

_Location = tuple[int | str, ...]


if TYPE_CHECKING:
    from yaml import SafeLoader as _SafeLoader
else:
    # libyaml's loader is ten times as fast, and every parse of dags/ reads every YAML.
    _SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueKeyLoader(_SafeLoader):
    """YAML lets a later key silently replace an equal earlier one; a config must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_pipeline(path: Path) -> PipelineSpec:
    """Read and validate one pipeline's YAML.

    Raises:
        ConfigError: the file is unreadable, no YAML, or no valid pipeline; every problem is listed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_pipeline(text, path)


def parse_pipeline(text: str, path: Path) -> PipelineSpec:
    """Validate a pipeline's YAML text; `path` is what messages call it.

    Raises:
        ConfigError: see `load_pipeline`.
    """
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        place = getattr(error, "position", 0)
        line = text.count("\n", 0, place if isinstance(place, int) else 0) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: expected a mapping with the keys of a pipeline, found {type(data).__name__}")
    try:
        spec = PipelineSpec.model_validate(data)
    except ValidationError as error:
        root = _compose(text)
        lines = [_describe(path, root, detail) for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    if spec.name != path.stem:
        raise ConfigError(
            f"{path}:{_line(_compose(text), ('name',))}: name: {spec.name!r} differs from the file's name",
            hint=f"call the file {spec.name}.yaml or the pipeline {path.stem}",
        )
    return spec


def load_pipelines(folder: Path) -> tuple[list[PipelineSpec], list[ConfigError]]:
    """Read every `*.yaml` of a folder: the valid ones, and an error for each of the others.

    One wrong file leaves the others alone.
    """
    specs: list[PipelineSpec] = []
    errors: list[ConfigError] = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            specs.append(load_pipeline(path))
        except ConfigError as error:
            errors.append(error)
    return specs, errors


def _compose(text: str) -> yaml.Node | None:
    """The YAML as nodes that know their lines: needed only to say where something is wrong."""
    root: yaml.Node | None = yaml.compose(text, Loader=_SafeLoader)
    return root


def _describe(path: Path, root: yaml.Node | None, detail: Any) -> str:
    location: _Location = tuple(part for part in detail["loc"] if part != "[key]")
    key = ".".join(str(part) for part in location) or "(the whole file)"
    message = str(detail["msg"]).removeprefix("Value error, ")
    line = _line(root, location)
    if detail["type"] == "missing":
        return f"{path}:{line}: {key}: is missing"
    if detail["type"] == "extra_forbidden":
        return f"{path}:{line}: {key}: no such key"
    value = detail["input"]
    found = f", found {value!r}" if isinstance(value, str | int | float | bool) or value is None else ""
    return f"{path}:{line}: {key}: {message}{found}"


def _line(root: yaml.Node | None, location: _Location) -> int:
    """The line of the deepest part of `location` that is in the file, counted from 1."""
    node, line = root, 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            match = next((pair for pair in node.value if pair[0].value == str(part)), None)
            if match is None:
                break
            line, node = match[0].start_mark.line + 1, match[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
