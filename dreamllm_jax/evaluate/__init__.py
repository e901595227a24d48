"""Scores of comprehension, creation and documents, and the report."""
