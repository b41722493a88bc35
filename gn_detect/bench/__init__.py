"""Times of a training step, part by part, and of norms."""
