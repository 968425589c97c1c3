"""Two import packages from one checkout: `gptcore` at the root, `gptkernels` under `kernels/`.

`kernels/` itself is not a package (Hugging Face owns that import name), so only its leaf folder is installed.
Everything else about the project stands in pyproject.toml.

With ``GPTKERNELS_PREBUILD=1`` the native kernels are compiled into the wheel, once for each level of instructions:
``GPTKERNELS_PREBUILD=1 pip wheel . --no-deps --no-build-isolation``. That one wheel serves every Python and every PyTorch
that the project supports. Without it the kernels are compiled at first use, and installing needs neither PyTorch nor a
compiler.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup


def prebuilt() -> dict[str, Any]:
    """Arguments of `setup` that compile the native kernels ahead of time."""
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Wheel(bdist_wheel):
        """Its tag names the platform alone: the libraries use nothing of Python."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    # By path: the package itself is what is being built.
    spec = importlib.util.spec_from_file_location("_native", Path(__file__).parent / "kernels/gptkernels/_native.py")
    assert spec is not None
    assert spec.loader is not None
    native = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its dataclass looks for itself
    spec.loader.exec_module(native)
    root = Path(__file__).parent
    sources = [str(path.relative_to(root)) for name, path in native.sources().items() if name.endswith(".cpp")]
    extensions = [
        CppExtension(
            f"gptkernels.{native.PREBUILT.name}.{native.prebuilt(level).stem}",
            sources,
            include_dirs=[str(root / "kernels/gptkernels")],
            extra_compile_args=[*native.FLAGS, *level.flags],
            py_limited_api=True,  # links nothing of Python
        )
        for level in native.LEVELS
        if level.name == "portable" or os.uname().machine == "x86_64"
    ]
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True), "bdist_wheel": Wheel},
    }


setup(
    packages=find_packages(include=["gptcore", "gptcore.*"]) + find_packages("kernels"),
    package_dir={"gptkernels": "kernels/gptkernels"},
    package_data={"gptkernels": ["**/*.md", "**/*.cpp", "**/*.h", "py.typed"], "gptcore": ["py.typed"]},
    **(prebuilt() if os.environ.get("GPTKERNELS_PREBUILD") == "1" else {}),
)
