"""Other libraries' models with our norms, converter, checkpoints and evaluation."""
