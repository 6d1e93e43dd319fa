# SPDX-License-Identifier: Apache-2.0
"""The compiled parts; everything else about the package is in pyproject.toml.

`cffi_modules` is a setup() keyword that pyproject.toml cannot express.
"""

import os
import sys

from setuptools import Extension, setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

ENGINE = "daemon/ublkd/engine"

setup(
    cffi_modules=[f"{ENGINE}/build.py:ffibuilder"],
    ext_modules=[
        # The Python target speaks the CPython C API; the engine itself must not.
        Extension(
            "ublkd._pytarget",
            sources=[f"{ENGINE}/target_python.c"],
            include_dirs=[ENGINE, "kernel_module/uapi"],
            extra_compile_args=["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers"],
        ),
    ],
)
