"""Fine-tuning of a pretrained detector with few images per worker: frozen BN against converted GN."""
