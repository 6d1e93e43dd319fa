# SPDX-License-Identifier: Apache-2.0
"""From a TOML file and the command line to a DeviceSpec. The command line wins over the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ublkd.config.schema import SETTINGS, DeviceSpec, Setting, check_cpus, nearest
from ublkd.errors import ConfigError, UsageError

DEFAULT_FILE = "/etc/ublkd/ublkd.toml"


def load(path: str) -> dict[str, Any]:
    """Settings that the file gives, by name, each checked by itself. ConfigError names file, line and key.

    A relative `file` counts from the directory of the TOML file.
    """
    import tomllib

    try:
        with open(path, "rb") as stream:
            text = stream.read().decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except ValueError:
        raise ConfigError(f"{path!r} is no file name") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(path, str(error))) from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: holds a number that is too long, or is nested too deeply") from None

    by_section: dict[str, dict[str, Setting]] = {}
    for setting in SETTINGS.values():
        by_section.setdefault(setting.section, {})[setting.key] = setting
    values: dict[str, Any] = {}
    for section, table in document.items():
        known = by_section.get(section)
        if known is None or not isinstance(table, dict):
            where = f"{path}:{_line_of(text, section, None)}"
            kind = "section" if isinstance(table, dict) else "key outside a section"
            hint = _home_of(section) or nearest(section, by_section)
            sections = ", ".join(f"[{name}]" for name in by_section)
            raise ConfigError(f"{where}: unknown {kind} {section!r}; the sections are {sections}", hint)
        for key, value in table.items():
            where = f"{path}:{_line_of(text, section, key)}: {section}.{key}"
            found = known.get(key)
            if found is None:
                hint = nearest(key, known) or _home_of(key)
                raise ConfigError(f"{where}: unknown key; [{section}] takes {', '.join(known)}", hint)
            try:
                values[found.name] = found.load(value)
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from None
    _refuse_foreign(values, path, text)
    file = values.get("file")
    if file is not None:
        values["file"] = os.path.join(os.path.dirname(os.path.abspath(path)), file)
    return values


def resolve(given: Mapping[str, Any], config: str | None = None) -> DeviceSpec:
    """The device that the command line (settings by name) and the file config ask for.

    Beyond the settings themselves this checks that the CPUs can be used. Nothing is opened or created.
    """
    values = load(config) if config else {}
    if config and "target" not in values and "target" not in given:
        raise ConfigError(f"{config}: device.target is missing; give {SETTINGS['target'].accepts}")
    if "target" in given and values.get("target", given["target"]) != given["target"]:
        raise UsageError(f"the command line says {given['target']}, {config} says {values['target']}")
    if "params" in given:
        values["params"] = {**values.get("params", {}), **given["params"]}
        given = {name: value for name, value in given.items() if name != "params"}
    values.update(given)
    # A Python class shares its state between queues only where it says so: it is never given more unasked.
    if values.get("cpus") and "queues" not in values and values.get("target") != "python":
        values["queues"] = max(1, len(values["cpus"]) // values.get("workers_per_queue", 1))
    try:
        spec = DeviceSpec(**values)
        check_cpus(spec.cpus or ())
    except UsageError as error:
        # With both at hand the fault may be in either; the message names the setting.
        if not config or given:
            raise
        raise ConfigError(f"{config}: {error.message}", error.hint) from None
    return spec


def misplaced(name: str, target: str) -> str | None:
    """Which targets the setting is for, when target is none of them: "is for the null target"."""
    targets = SETTINGS[name].targets
    if not targets or target in targets:
        return None
    *most, last = targets
    names = f"{', '.join(most)} and {last} targets" if most else f"{last} target"
    return f"is for the {names}"


def _refuse_foreign(values: Mapping[str, Any], path: str, text: str) -> None:
    for name in values:
        setting = SETTINGS[name]
        fault = misplaced(name, values["target"]) if "target" in values else None
        if fault:
            line = _line_of(text, setting.section, setting.key)
            where = f"{path}:{line}: {setting.section}.{setting.key}"
            raise ConfigError(f"{where} {fault}, not for {values['target']}")


def _home_of(key: str) -> str:
    sections = [setting.section for setting in SETTINGS.values() if setting.key == key]
    return f"{key} belongs into [{sections[0]}]" if sections else ""


def _line_of(text: str, section: str, key: str | None) -> int:
    """Line on which [section], or key in it, is written; that of the section for syntax not known here."""
    inside, best = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("["):
            inside = line.strip("[] \t").split("]")[0].replace(" ", "").replace('"', "").replace("'", "")
            if inside == section or inside.startswith(section + "."):
                best = number if best == 1 else best
                if key is None or inside == f"{section}.{key}":
                    return number
            continue
        name, equals, _ = line.partition("=")
        word = name.replace(" ", "").replace('"', "").replace("'", "")
        if not equals or line.startswith("#"):
            continue
        full = f"{inside}.{word}" if inside else word
        wanted = section if key is None else f"{section}.{key}"
        if full == wanted or full.startswith(wanted + "."):
            return number
    return best


def _syntax_error(path: str, message: str) -> str:
    """tomllib's "Expected ... (at line 3, column 5)" as "path:3: ..."."""
    text, found, place = message.rpartition(" (at line ")
    if not found:
        return f"{path}: {message}"
    line = place.split(",")[0]
    return f"{path}:{line}: {text[:1].lower()}{text[1:]}" if line.isdigit() else f"{path}: {message}"
