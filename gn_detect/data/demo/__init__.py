"""The built-in dataset of generated pictures."""
