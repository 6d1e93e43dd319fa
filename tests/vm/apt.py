# SPDX-License-Identifier: Apache-2.0
"""Ask the machine's own apt for packages, with private lists: needs no root, changes nothing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

OWN = "own"
"""Stands for the Debian suites that this machine is already set up with."""

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TARGET = "$(SITE)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(CODENAME)"


class AptError(Exception):
    """apt could not be run, reached, or has no such package."""


def run(command: list[str], cwd: Path | None = None) -> str:
    """Run an apt tool and return its output. Raises AptError with its last words."""
    env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    null = subprocess.DEVNULL
    try:
        done = subprocess.run(command, cwd=cwd, env=env, stdin=null, capture_output=True, text=True)
    except FileNotFoundError:
        raise AptError(f"{command[0]} is missing: only Debian machines can fetch kernels") from None
    errors = [line for line in done.stderr.splitlines() if line.startswith(("E:", "Err:"))]
    if done.returncode or any("Failed to fetch" in line for line in done.stderr.splitlines()):
        raise AptError(errors[0] if errors else f"{command[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


class Source:
    """A set of suites with its own package lists below `state`."""

    def __init__(self, suite: str, state: Path) -> None:
        self.suite = suite
        self._dir = state / suite
        self._options = [
            f"-oDir::Etc::sourcelist={self._dir}/sources.list",
            "-oDir::Etc::sourceparts=/dev/null",
            f"-oDir::State::lists={self._dir}/lists",
            "-oDir::Cache::pkgcache=",
            "-oDir::Cache::srcpkgcache=",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=2",
            # apt's own user may not enter a private directory
            "-oAPT::Sandbox::User=root",
        ]

    def update(self) -> None:
        """Fetch the suite's package lists."""
        (self._dir / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (self._dir / "sources.list").write_text(self._entries())
        self._get("update")

    def packages(self, pattern: str) -> list[str]:
        """Names of the packages that match a regular expression in full."""
        listed = run(["apt-cache", *self._options, "search", "--names-only", f"^{pattern}$"])
        names = [line.split(" ")[0] for line in listed.splitlines()]
        return [name for name in names if re.fullmatch(pattern, name)]

    def depends(self, package: str) -> list[str]:
        """Names of the packages that one depends on."""
        listed = run(["apt-cache", *self._options, "depends", "--no-recommends", "--no-suggests", package])
        lines = (line.strip() for line in listed.splitlines())
        return [line.removeprefix("Depends: ") for line in lines if line.startswith("Depends: ")]

    def version(self, package: str) -> str:
        """The version of a package."""
        shown = run(["apt-cache", *self._options, "show", "--no-all-versions", package])
        return next(line.split()[1] for line in shown.splitlines() if line.startswith("Version: "))

    def site(self) -> str:
        """Base address of the archive that the suite is in."""
        return _main_site(_own_targets())

    def download(self, packages: list[str], into: Path) -> list[Path]:
        """Download packages and return the files."""
        self._get("download", *packages, cwd=into)
        return sorted(into.glob("*.deb"))

    def _get(self, *arguments: str, cwd: Path | None = None) -> None:
        run(["apt-get", *self._options, "-q", *arguments], cwd)

    def _entries(self) -> str:
        signed = f" [signed-by={_KEYRING}]" if _KEYRING.exists() else ""
        targets = _own_targets()
        if self.suite != OWN:
            targets = [(_main_site(targets), self.suite, "main")]
        return "".join(f"deb{signed} {site} {suite} {component}\n" for site, suite, component in targets)


def _own_targets() -> list[tuple[str, str, str]]:
    """(site, suite, component) of each Debian suite that the machine uses."""
    listed = run(["apt-get", "indextargets", "--format", _TARGET, "Created-By: Packages"])
    rows = [line.split("|") for line in listed.splitlines()]
    # before the first `apt-get update` apt doesn't know a suite's origin and leaves the placeholder in
    return [
        (site, suite, component)
        for site, suite, component, origin, _ in rows
        if component == "main" and (origin == "Debian" or origin.startswith("$"))
    ]


def _main_site(targets: list[tuple[str, str, str]]) -> str:
    """Base address of the main archive, which security and update suites may not share."""
    for site, suite, _ in targets:
        if "-" not in suite:
            return site
    raise AptError("apt has no Debian suite set up: see sources.list(5)")
