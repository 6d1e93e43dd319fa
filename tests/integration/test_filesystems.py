# SPDX-License-Identifier: Apache-2.0
"""Real file systems with real trees of files, also seen through the kernel's own loop driver afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lib.device import Device
from lib.tools import MIB, allocated, digest_tree, sh

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 320 * MIB  # XFS takes no less than 300

# name: make, check, how the backing file is served
FILE_SYSTEMS = {
    "ext4": (["mkfs.ext4", "-qF"], ["e2fsck", "-fn"], {"direct": "on"}),
    "xfs": (["mkfs.xfs", "-qf"], ["xfs_repair", "-n"], {"direct": "off"}),
    "btrfs": (["mkfs.btrfs", "-qf"], ["btrfs", "check"], {"direct": "on", "transport": "user-copy"}),
}


@contextmanager
def mounted(device: str, where: Path, *options: str) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    sh("mount", *options, device, where)
    try:
        yield where
    finally:
        sh("umount", where)


@contextmanager
def kernel_loop(backing: Path) -> Iterator[str]:
    """The backing file as the kernel's own loop driver serves it."""
    sh("modprobe", "loop")
    path = sh("losetup", "--find", "--show", backing).strip()
    try:
        yield path
    finally:
        sh("losetup", "--detach", path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred files: sources, and what sources lack."""
    top = tmp_path_factory.mktemp("tree")
    for name in ("daemon", "docs"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, top / name, symlinks=True, ignore=unwanted)
    (top / "many").mkdir()
    for number in range(250):
        (top / "many" / f"file {number}").write_bytes(b"%d\n" % number * (number * 4))
    with open(top / "sparse", "wb") as file:
        file.truncate(8 * MIB)
        file.seek(5 * MIB)
        file.write(b"island")
    (top / "empty").touch()
    (top / "link").symlink_to("docs")
    (top / "big").write_bytes(os.urandom(4 * MIB))
    return top


def fill(top: Path, tree: Path) -> dict[str, str]:
    """Copy the tree, and take part of it away again."""
    sh("cp", "-a", f"{tree}/.", top)
    shutil.rmtree(top / "daemon")
    sh("cp", "-a", tree / "daemon", top / "moved")
    found = digest_tree(top)
    assert len(found) > 300
    assert found["./big"] == digest_tree(tree)["./big"]
    return found


@pytest.mark.parametrize("name", FILE_SYSTEMS)
def test_a_tree_of_files_survives(
    name: str, serve: Callable[..., Device], image: Callable[..., Path], tree: Path, tmp_path: Path
) -> None:
    make, check, settings = FILE_SYSTEMS[name]
    backing = image(SIZE)
    device = serve("loop", backing, **settings)
    assert device.record["details"]["direct"] == (settings["direct"] == "on")
    sh(*make, device.path)
    assert allocated(backing) < SIZE // 2, "the file is sparse no more"
    with mounted(device.path, tmp_path / "mnt") as top:
        written = fill(top, tree)
    sh(*check, device.path)
    with mounted(device.path, tmp_path / "mnt") as top:
        assert digest_tree(top) == written
        before = allocated(backing)
        shutil.rmtree(top / "many")
        sh("sync", "--file-system", top)
        sh("fstrim", top)
    written = {path: digest for path, digest in written.items() if not path.startswith("./many/")}
    assert device.ios("discard") > 0
    assert allocated(backing) <= before
    device.stop()

    with kernel_loop(backing) as loop:
        sh(*check, loop)
        with mounted(loop, tmp_path / "mnt", "-o", "ro") as top:
            assert digest_tree(top) == written
