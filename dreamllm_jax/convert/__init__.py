"""Weights from PyTorch and back, and the converted form on disk."""
