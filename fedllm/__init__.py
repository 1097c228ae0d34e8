"""Federated fine-tuning of foundation models on Flower."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedllm.api import Result, run

__all__ = ["Result", "__version__", "run"]
try:
    __version__ = version("fedllm")
except PackageNotFoundError:  # inside a Flower bundle the code runs without being installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    """Import `run` and `Result` when first asked for: every module of fedllm runs this file first."""
    if name in ("Result", "run"):
        return getattr(import_module("fedllm.api"), name)
    raise AttributeError(f"module 'fedllm' has no attribute {name!r}")
