"""Compiles a recipe's programs for chips that are not attached; reports memory, FLOPs and minimum step time.

In: a recipe, one of its programs, and a topology such as `v5p:4x4x4` or `h100:8`.
Out: a report (text, JSON, figure), or the fastest settings that fit.
Never: runs a program, or needs an accelerator.
"""
