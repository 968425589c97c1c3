"""Two import packages from one checkout: `gptcore` at the root, `gptkernels` under `kernels/`.

`kernels/` itself is not a package (Hugging Face owns that import name), so only its leaf folder is installed.
Everything else about the project stands in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["gptcore", "gptcore.*"]) + find_packages("kernels"),
    package_dir={"gptkernels": "kernels/gptkernels"},
    package_data={"gptkernels": ["**/*.md", "**/*.cpp", "**/*.h", "py.typed"], "gptcore": ["py.typed"]},
)
