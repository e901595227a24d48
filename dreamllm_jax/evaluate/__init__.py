"""Scores of saved models.

In:     a saved model, and a recipe whose stage names the data.
Out:    losses on held-out batches, as a dictionary that JSON can hold.
Never:  training, or anything about one project's data: examples measure their own.
"""
