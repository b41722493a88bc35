"""How well a BatchNorm model survives the conversion, on real weights and real images."""
