"""Compiles a recipe's programs for TPUs that are not there, and says whether they fit and how fast they can be."""
