# SPDX-License-Identifier: Apache-2.0
"""The Python mirror of the interface against the C header, and both against what kernels take."""

import pathlib
import re
import shutil
import subprocess

import pytest

from ublkd.control import uapi
from ublkd.control.features import FALLBACK, Features
from ublkd.control.uapi import Command

HEADER = pathlib.Path(__file__).resolve().parents[2] / "kernel_module" / "uapi" / "ublk.h"

# As Linux 7.2 has them.
OPCODES = {
    "GET_QUEUE_AFFINITY": 0x80207501,
    "GET_DEV_INFO": 0x80207502,
    "ADD_DEV": 0xC0207504,
    "DEL_DEV": 0xC0207505,
    "START_DEV": 0xC0207506,
    "STOP_DEV": 0xC0207507,
    "SET_PARAMS": 0xC0207508,
    "GET_PARAMS": 0x80207509,
    "START_USER_RECOVERY": 0xC0207510,
    "END_USER_RECOVERY": 0xC0207511,
    "GET_DEV_INFO2": 0x80207512,
    "GET_FEATURES": 0x80207513,
    "DEL_DEV_ASYNC": 0x80207514,
    "UPDATE_SIZE": 0xC0207515,
    "QUIESCE_DEV": 0xC0207516,
    "TRY_STOP_DEV": 0xC0207517,
    "REG_BUF": 0xC0207518,
    "UNREG_BUF": 0xC0207519,
    "GET_QUEUE_STATES": 0x80207560,
}
IO_OPCODES = {
    "FETCH_REQ": 0xC0107520,
    "COMMIT_AND_FETCH_REQ": 0xC0107521,
    "NEED_GET_DATA": 0xC0107522,
    "REGISTER_IO_BUF": 0xC0107523,
    "UNREGISTER_IO_BUF": 0xC0107524,
    "PREP_IO_CMDS": 0xC0107525,
    "COMMIT_IO_CMDS": 0xC0107526,
    "FETCH_IO_CMDS": 0xC0107527,
}

# Python's name of a field's offset or of a size -> the C expression it must equal.
LAYOUT = {
    "CTRL_CMD.size": "sizeof(struct ublksrv_ctrl_cmd)",
    "DEV_INFO.size": "sizeof(struct ublksrv_ctrl_dev_info)",
    "SHMEM_BUF_REG.size": "sizeof(struct ublk_shmem_buf_reg)",
    "QUEUE_STATE.size": "sizeof(struct ublk_queue_state)",
    "QUEUE_ORPHANED": "UBLK_QUEUE_ORPHANED",
    "PARAMS_BYTES": "sizeof(struct ublk_params)",
    "BASIC.size": "sizeof(struct ublk_param_basic)",
    "DISCARD.size": "sizeof(struct ublk_param_discard)",
    "DEVT.size": "sizeof(struct ublk_param_devt)",
    "ZONED.size": "sizeof(struct ublk_param_zoned)",
    "DMA_ALIGN.size": "sizeof(struct ublk_param_dma_align)",
    "SEGMENT.size": "sizeof(struct ublk_param_segment)",
    "INTEGRITY.size": "sizeof(struct ublk_param_integrity)",
    "BASIC_OFFSET": "offsetof(struct ublk_params, basic)",
    "DISCARD_OFFSET": "offsetof(struct ublk_params, discard)",
    "DEVT_OFFSET": "offsetof(struct ublk_params, devt)",
    "ZONED_OFFSET": "offsetof(struct ublk_params, zoned)",
    "DMA_ALIGN_OFFSET": "offsetof(struct ublk_params, dma)",
    "SEGMENT_OFFSET": "offsetof(struct ublk_params, seg)",
    "INTEGRITY_OFFSET": "offsetof(struct ublk_params, integrity)",
    "MAX_QUEUES": "UBLK_MAX_NR_QUEUES",
    "MAX_DEPTH": "UBLK_MAX_QUEUE_DEPTH",
    "MAX_IO_BYTES": "1ull << UBLK_IO_BUF_BITS",
    "STATE_DEAD": "UBLK_S_DEV_DEAD",
    "STATE_LIVE": "UBLK_S_DEV_LIVE",
    "STATE_QUIESCED": "UBLK_S_DEV_QUIESCED",
    "STATE_FAIL_IO": "UBLK_S_DEV_FAIL_IO",
    "SHMEM_BUF_READ_ONLY": "UBLK_SHMEM_BUF_READ_ONLY",
    **{
        f"TYPE_{t}": f"UBLK_PARAM_TYPE_{t}"
        for t in ["BASIC", "DISCARD", "DEVT", "ZONED", "DMA_ALIGN", "SEGMENT", "INTEGRITY"]
    },
    **{f"ATTR_{a}": f"UBLK_ATTR_{a}" for a in ["READ_ONLY", "ROTATIONAL", "VOLATILE_CACHE", "FUA"]},
    **{f"F_{name}": f"UBLK_F_{name}" for name in uapi.FLAGS},
}


def evaluate(expressions: list[str], tmp_path: pathlib.Path) -> list[int]:
    """What a C compiler makes of them with the header included."""
    cc = shutil.which("cc") or shutil.which("gcc")
    if cc is None:
        pytest.skip("no C compiler")
    lines = "\n".join(f'\tprintf("%llu\\n", (unsigned long long)({e}));' for e in expressions)
    source = tmp_path / "eval.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/ioctl.h>\n"
        f'#include "{HEADER}"\nint main(void)\n{{\n{lines}\n\treturn 0;\n}}\n'
    )
    program = tmp_path / "eval"
    subprocess.run([cc, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return [int(line) for line in out.split()]


def value_of(name: str) -> int:
    value = uapi
    for part in name.split("."):
        value = getattr(value, part)
    return int(value)  # type: ignore[call-overload, no-any-return]


def test_opcodes_are_what_kernels_take() -> None:
    assert {c.name: uapi.encoded(c) for c in Command} == OPCODES


def test_header_has_the_same_opcodes(tmp_path: pathlib.Path) -> None:
    names = [*(f"UBLK_U_CMD_{n}" for n in OPCODES), *(f"UBLK_U_IO_{n}" for n in IO_OPCODES)]
    assert evaluate(names, tmp_path) == [*OPCODES.values(), *IO_OPCODES.values()]


def test_layouts_and_constants_are_those_of_the_header(tmp_path: pathlib.Path) -> None:
    in_c = dict(zip(LAYOUT, evaluate(list(LAYOUT.values()), tmp_path), strict=True))
    assert {name: value_of(name) for name in LAYOUT} == in_c


def test_every_flag_of_the_header_is_in_the_table() -> None:
    in_header = set(re.findall(r"^#define UBLK_F_(\w+)\s", HEADER.read_text(), re.M))
    assert in_header == set(uapi.FLAGS)


def test_header_can_be_included_from_cxx_too(tmp_path: pathlib.Path) -> None:
    cxx = shutil.which("c++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "include.cc"
    source.write_text(f'#include "{HEADER}"\n')
    subprocess.run([cxx, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", source], check=True)


def test_flag_names() -> None:
    assert uapi.flag_names(uapi.F_USER_COPY | uapi.F_SUPPORT_ZERO_COPY) == ["SUPPORT_ZERO_COPY", "USER_COPY"]
    assert uapi.flag_names(1 << 40) == ["BIT_40"]
    assert uapi.flag_names(0) == []


def test_features() -> None:
    features = Features(0x1FE)  # Linux 6.12
    assert features.has("ZONED") and not features.has("SUPPORT_ZERO_COPY")
    assert len(features.names()) == 8 and not features.assumed
    assert FALLBACK.assumed and FALLBACK.has("USER_RECOVERY_REISSUE") and not FALLBACK.has("USER_COPY")
