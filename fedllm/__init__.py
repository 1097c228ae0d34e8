"""Federated fine-tuning of foundation models on Flower."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedllm")
except PackageNotFoundError:  # inside a Flower bundle the code runs without being installed
    __version__ = "unknown"
