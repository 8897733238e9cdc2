"""How settings are read: presets, YAML files and options become one ``RunConfig``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distill.config.schema import RunConfig
from distill.errors import UserError

# Where settings start from. ``formula``: the loss with its own defaults, T = 3. ``recommended``:
# what measured best (docs/benchmarks.md): the temperature the student will be used at, and the
# teacher alone, without cross-entropy on the text.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {"loss.temperature": 1.0, "loss.alpha": 1.0, "loss.beta": 0.0},
    "formula": {},
}
RECOMMENDED = "recommended"


def load_config(
    path: Path | None, overrides: dict[str, Any], settings: list[str], preset: str = RECOMMENDED
) -> RunConfig:
    """Combine a preset, a JSON or YAML file, flags and ``section.key=value``; later ones win.

    ``overrides`` maps dotted keys to values (``None``: not given).

    Raises:
        UserError: unreadable file, unknown keys or values out of range, all of which it names.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset!r} does not exist; choose {' or '.join(PRESETS)}")
    tree: dict[str, Any] = _read_tree(path) if path else {}
    for key, value in PRESETS[preset].items():
        section, _, name = key.partition(".")
        given = tree.setdefault(section, {})
        if isinstance(given, dict):  # else it is refused below, by its own name
            given.setdefault(name, value)
    for key, value in overrides.items():
        if value is not None:
            _put(tree, key, value)
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise UserError(
                f"--set {setting!r}: write section.key=value, for example train.learning_rate=0.001"
            )
        try:
            _put(tree, key, yaml.safe_load(text))
        except yaml.YAMLError:
            raise UserError(f"--set {setting!r}: the value {text!r} cannot be read") from None
    return parse_config(tree, f" in {path}" if path else "")


def parse_config(tree: Any, where: str = "") -> RunConfig:
    """Validate a tree of settings; ``UserError`` names every unknown key and bad value."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()]
        raise UserError(f"configuration{where}: " + "; ".join(problems)) from None


def _problem(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggestion(item['loc'])}"
    message = str(item["msg"].removeprefix("Value error, "))
    return f"{key} = {_shown(item)}: {message}" if key else message  # else it is of the whole


def _shown(item: Any) -> str:
    """A refused value, but for a token, which must not be in a log."""
    value, secret = item["input"], "token"
    if item["loc"][-1] == secret:
        return "…"
    return repr(value | {secret: "…"} if isinstance(value, dict) and secret in value else value)


def _suggestion(location: tuple[Any, ...]) -> str:
    section: Any = RunConfig
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    return f" (there are: {', '.join(section.model_fields)})"


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UserError(
            f"configuration {path} is not valid {kind}: {' '.join(str(error).split())}"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            f"configuration {path} must be a mapping of sections, not {type(tree).__name__}"
        )
    return tree


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"configuration key {dotted!r}: {section!r} is not a section")
    tree[key] = value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
