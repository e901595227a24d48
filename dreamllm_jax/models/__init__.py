"""The towers, the connectors between them, and DreamLLM as their composition.

In: a frozen config (`config.model`), parameters, and arrays: a `Batch`, images, tokens, latents. Out: hidden
states, logits, conditions and images, from pure functions; `parameters` says what a model consists of. Never:
computes a loss, updates a parameter, reads a file, or depends on the platform (`ops` and `sharding` do).
"""
