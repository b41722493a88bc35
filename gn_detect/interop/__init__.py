"""Partners: other libraries' models with our norms, converter, checkpoints and evaluation."""
