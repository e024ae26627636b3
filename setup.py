"""offmoe, offmoe.cache and offmoe.kernels are one package in three top-level folders."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"offmoe": "offmoe", "offmoe.cache": "cache", "offmoe.kernels": "kernels"}

setup(
    name="offmoe",
    version="0.1.0",
    description="Offloading inference runtime for mixture-of-experts models on one GPU",
    long_description=Path("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{sub}" for sub in find_packages(folder)))
    ],
    package_data={
        "offmoe.demo": ["*.gguf", "*.md", "LICENSE"],
        "offmoe": ["py.typed"],
        "offmoe.cache": ["py.typed"],
        "offmoe.kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.9",
        "safetensors>=0.5",
        "numpy>=2.0",
        "psutil>=6.0",
        "click>=8.2",
        "tokenizers>=0.21",
        "jinja2>=3.1.6",
        "gguf>=0.17",
        "rich>=13.9",
        "markdown-it-py>=3.0",
        "prompt_toolkit>=3.0.50",
        "huggingface_hub>=1.0",
    ],
    extras_require={
        "llama": ["llama-cpp-python>=0.3.16"],
        "lab": ["matplotlib>=3.10", "numba>=0.61"],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],
        "test": [
            "pytest>=8.3",
            "pytest-cov>=6.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.120",
            "pexpect>=4.9",
            "pyte>=0.8",
            "setuptools>=77",
            "transformers>=5.0",
            "triton>=3.6",
            "ruff>=0.14",
            "mypy>=1.18",
        ],
    },
    entry_points={"console_scripts": ["offmoe = offmoe.app.cli:main"]},
)
