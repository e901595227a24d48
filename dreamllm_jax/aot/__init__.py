"""Compiles programs for TPUs that are not there: whether they fit, and how fast they can be at most."""
