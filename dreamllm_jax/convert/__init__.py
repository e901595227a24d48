"""Converts weights from PyTorch's formats and back.

In: a checkpoint in a foreign format, or a saved model. Out: a saved model, or folders that transformers,
diffusers and the reference load; both streamed, tensor by tensor. Never: computes with the weights, or holds
a model in memory.
"""
