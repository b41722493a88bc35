"""Names of tensors in the checkpoints of other libraries."""
