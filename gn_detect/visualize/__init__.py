"""Pictures for people: detections and ground truth drawn on images, grids of both, and training curves.

Outlines, fills and labels are drawn by matplotlib's Agg on a transparent layer that is then laid over the
picture: pixels that nothing is drawn on stay as they were.
"""

from .canvas import Crop, Masks, crop_mask, picture_scale
from .comparison import draw_comparison
from .curves import Metrics, is_average, is_loss, metric_points, plot_curves, read_metrics
from .objects import draw_detections, draw_ground_truth
from .pictures import encode_picture, save_picture, save_picture_grid, side_by_side

__all__ = [
    "Crop",
    "Masks",
    "Metrics",
    "crop_mask",
    "draw_comparison",
    "draw_detections",
    "draw_ground_truth",
    "encode_picture",
    "is_average",
    "is_loss",
    "metric_points",
    "picture_scale",
    "plot_curves",
    "read_metrics",
    "save_picture",
    "save_picture_grid",
    "side_by_side",
]
