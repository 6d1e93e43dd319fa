# SPDX-License-Identifier: Apache-2.0
"""The engine is plain C: nothing of it needs Python, and everything engine.h declares is there."""

import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENGINE = ROOT / "daemon" / "ublkd" / "engine"
SOURCES = sorted(path.name for path in ENGINE.glob("*.c") if path.name != "target_python.c")


GCC = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", f"-I{ENGINE}", f"-I{ROOT}/kernel_module/uapi"]


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    where = tmp_path_factory.mktemp("engine")
    for name in SOURCES:
        subprocess.run([*GCC, "-c", "-o", str(where / f"{name}.o"), str(ENGINE / name)], check=True)
    return where


def symbols(path: pathlib.Path, *options: str) -> set[str]:
    out = subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1] for line in out.splitlines() if line.strip()}


def test_there_is_an_engine():
    assert {"queue.c", "dispatch.c", "target_loop.c", "target_memory.c", "target_null.c"} <= set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_needs_no_python(objects, name):
    every = symbols(objects / f"{name}.o")
    assert any(s.startswith("ublkd_") for s in every)
    assert [s for s in every if re.match(r"_?Py", s)] == []


@pytest.mark.parametrize("name", SOURCES)
def test_includes_no_python(name):
    assert not re.search(r'#\s*include\s*[<"]Python\.h', (ENGINE / name).read_text())


def test_headers_stand_alone(objects):
    for header in sorted(ENGINE.glob("*.h")):
        source = f'#include "{header.name}"\n#include "{header.name}"\n'
        subprocess.run(
            [*GCC, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-xc", "-"],
            input=source,
            text=True,
            check=True,
        )


def test_declared_and_defined_agree(objects):
    api = re.sub(r"/\*.*?\*/", "", (ENGINE / "engine.h").read_text(), flags=re.S)
    declared = set(re.findall(r"\b(ublkd_[a-z0-9_]+)\(", api))
    assert len(declared) > 10
    defined = set()
    for name in SOURCES:
        defined |= symbols(objects / f"{name}.o", "-g", "--defined-only")
    assert declared - defined == set()
    assert {d for d in defined if not d.startswith("ublkd_")} == set()
