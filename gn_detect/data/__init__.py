"""COCO datasets, augmentation, samplers and loaders."""

from .augmentation import build_augmentations, prepare_image, prepare_test_image, shortest_edge_size
from .coco.dataset import (
    CocoDataset,
    check_classes,
    check_same_classes,
    join_datasets,
    list_names,
    match_classes,
    match_names,
)
from .coco.reader import read_image_list
from .datasets import DatasetSource, datasets_root, resolve_dataset
from .doctor.quick import warn_of_faults
from .images import read_image
from .loader import SampleLoader, build_loss_loader, build_test_loader, build_train_loader

__all__ = [
    "CocoDataset",
    "DatasetSource",
    "SampleLoader",
    "build_augmentations",
    "build_loss_loader",
    "build_test_loader",
    "build_train_loader",
    "check_classes",
    "check_same_classes",
    "datasets_root",
    "join_datasets",
    "list_names",
    "match_classes",
    "match_names",
    "prepare_image",
    "prepare_test_image",
    "read_image",
    "read_image_list",
    "resolve_dataset",
    "shortest_edge_size",
    "warn_of_faults",
]
