"""Text, images and documents from a trained model.

In: a model's config, parameters and tokenizer, and prompts (strings or `Document`s).
Out: strings, PIL images, `Document`s.
Never: trains, or changes parameters.
"""
