"""COCO datasets, augmentation, samplers and loaders."""

from .augmentation import build_augmentations, prepare_image, shortest_edge_size
from .coco import CocoDataset, check_classes, check_order, check_same_classes, join_datasets
from .coco_json import read_image_list
from .datasets import DatasetSource, datasets_root, resolve_dataset
from .doctor_quick import warn_of_faults
from .images import read_image
from .loader import SampleLoader, build_test_loader, build_train_loader

__all__ = [
    "CocoDataset",
    "DatasetSource",
    "SampleLoader",
    "build_augmentations",
    "build_test_loader",
    "build_train_loader",
    "check_classes",
    "check_order",
    "check_same_classes",
    "datasets_root",
    "join_datasets",
    "prepare_image",
    "read_image",
    "read_image_list",
    "resolve_dataset",
    "shortest_edge_size",
    "warn_of_faults",
]
