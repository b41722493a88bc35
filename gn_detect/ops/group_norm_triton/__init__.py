"""Triton kernels of Group Normalization; ``launch`` calls them with the tiles of ``plan``.

Both memory orders, (N, C, pixels) and (N, pixels, C), run the same code on tiles of (channels, pixels). Only
the strides differ. The channels of a tile are ``BLOCK_GROUPS`` groups of ``BLOCK_DEPTH`` channels, or with
``BLOCK_GROUPS`` 1 a piece of one group. Formulas: Wu & He 2018, section 3.1; dz is dy where the ReLU passed:

    xhat = (x - mean) * rstd          z = xhat * weight + bias + residual          y = relu(z)
    d_weight = sum(dz * xhat)         d_bias = sum(dz)                             d_residual = dz
    dx = rstd * (weight * dz - (sum(weight * dz) + xhat * sum(weight * dz * xhat)) / count)

Statistics are in float32, or float64 for float64 input, and never the difference of two large numbers. A
tile in registers is centred before it is squared. A loop sums differences from the mean of its first tile;
this tile is a part of the data, so the cancellation is at most the number of tiles in the loop. Partial
statistics are merged as in Chan, Golub & LeVeque 1979.
"""
