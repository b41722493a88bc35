"""Into how many groups a layer's channels are split."""

from __future__ import annotations


def choose_groups(
    channels: int,
    num_groups: int = 32,
    min_channels_per_group: int = 1,
    group_size: int | None = None,
) -> int:
    """The largest divisor of ``channels`` up to ``num_groups`` that leaves large enough groups.

    Args:
        channels: C.
        num_groups: at most so many; 1 is Layer Normalization (over C, H and W), C Instance Normalization.
        min_channels_per_group: at least so many channels in each group; a layer with fewer is one group.
        group_size: exactly so many channels in each group instead, as in table 3 of the paper.

    Raises:
        ValueError: an argument is below 1, or ``channels`` is no multiple of ``group_size``.
    """
    if min(channels, num_groups, min_channels_per_group, group_size or 1) < 1:
        raise ValueError("channels, num_groups, min_channels_per_group and group_size are at least 1")
    if group_size is not None:
        if channels % group_size:
            raise ValueError(f"{channels} channels cannot be split into groups of {group_size}")
        return channels // group_size
    most = max(1, min(num_groups, channels // min_channels_per_group))
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)
