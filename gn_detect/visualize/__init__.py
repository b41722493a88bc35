"""Pictures for people: detections and ground truth on images, grids of both, and training curves.

matplotlib's Agg draws on a transparent layer, which is then laid over the picture. Pixels without a drawing
keep their values.
"""

from .canvas import Crop, Masks, crop_mask, picture_scale
from .curves import Curve, draw_chart, plot_curves
from .metrics import Metrics, is_average, is_loss, is_validation_loss, metric_points, read_metrics
from .objects import draw_comparison, draw_detections, draw_ground_truth
from .pictures import encode_picture, save_picture, save_picture_grid, side_by_side

__all__ = [
    "Crop",
    "Curve",
    "Masks",
    "Metrics",
    "crop_mask",
    "draw_chart",
    "draw_comparison",
    "draw_detections",
    "draw_ground_truth",
    "encode_picture",
    "is_average",
    "is_loss",
    "is_validation_loss",
    "metric_points",
    "picture_scale",
    "plot_curves",
    "read_metrics",
    "save_picture",
    "save_picture_grid",
    "side_by_side",
]
