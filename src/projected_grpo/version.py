"""The version that files carry."""

from importlib.metadata import version

__version__ = version("projected-grpo")
