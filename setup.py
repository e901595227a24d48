"""Builds the package; its metadata, dependencies and tools are described in pyproject.toml."""

from setuptools import setup

setup()
