"""Documents of text and pictures, to tokens, to packed rows, to batches."""
