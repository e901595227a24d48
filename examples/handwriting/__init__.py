"""The demonstration: a small DreamLLM trained on scikit-learn's handwritten digits, and its evaluation.

In: the digits, and the recipe of `config.py`. Out: a trained work folder, `report.html`, `metrics.json`.
Never: anything that the package would have to know about.
"""
