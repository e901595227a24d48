"""Objectives, the train step, and the loop over stages."""
