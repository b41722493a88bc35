"""Files as the catalogue's publishers write them: names, layouts, containers and types, with any values."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from gn_detect.config import Config
from gn_detect.weights.zoo import ZooEntry

from . import schemes
from .schemes import State

MMDETECTIONS_CONFIG = """
norm_cfg = dict(type='GN', num_groups={groups}, requires_grad=True)
img_norm_cfg = dict(
    mean={mean}, std={std}, to_rgb={rgb})
conv_cfg = {conv}
model = dict(
    backbone=dict(conv_cfg=conv_cfg),
    neck=dict(conv_cfg=conv_cfg),
    roi_head=dict(bbox_head=dict(conv_cfg=conv_cfg), mask_head=dict(conv_cfg=conv_cfg)))
"""


def values_for(entry: ZooEntry, model: torch.nn.Module) -> State:
    """Return the tensors of a whole model, in our names; norms are such as the entry's format can hold."""
    state = schemes.randomised(model)
    # Detectron stores frozen BatchNorms as scale and shift, detectron2's copies of its backbones whole.
    folded = entry.scheme == "Detectron" and "/detectron2/" not in entry.url
    return schemes.with_affine_norms(state) if folded else state


def write(entry: ZooEntry, cfg: Config, state: State) -> Path:
    """``entry.file`` with those values, or those of the backbone for an entry of a backbone."""
    path = entry.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if entry.kind == "backbone":
        state = schemes.backbone_of(state)
    writers = {
        "Detectron": _detectron,
        "detectron2": _detectron2,
        "torchvision": _timm,
        "mmdetection": _mmdetection,
        "BiT": _bit,
        "tensorpack": _tensorpack,
    }
    writers[entry.scheme](path, entry, cfg, state)
    return path


def _detectron(path: Path, entry: ZooEntry, cfg: Config, state: State) -> None:
    whole_norms = "/detectron2/" in entry.url
    blobs = schemes.arrays(schemes.as_detectron(state, cfg.model.resnets.depth, whole_norms))
    if entry.kind == "detector":
        blobs |= {f"{name}_momentum": value for name, value in blobs.items()}
        schemes.write_pickle(path, {"blobs": blobs, "cfg": "MODEL:\n  TYPE: generalized_rcnn\n"})
        return
    classifier = "fc1000" if "MSRA" in entry.name else "pred"
    blobs |= schemes.arrays({f"{classifier}_w": torch.ones(1000, 8), f"{classifier}_b": torch.ones(1000)})
    if "MSRA" in entry.name:
        blobs["conv1_b"] = torch.zeros(len(state["backbone.bottom_up.stem.conv1.weight"])).numpy()
    schemes.write_pickle(path, blobs if whole_norms else {"blobs": blobs})


def _detectron2(path: Path, entry: ZooEntry, cfg: Config, state: State) -> None:
    if entry.kind == "backbone":  # made from torchvision's, classifier and all
        bare = {name.removeprefix("backbone.bottom_up."): tensor for name, tensor in state.items()}
        bare |= {"stem.fc.weight": torch.ones(1000, 8), "stem.fc.bias": torch.ones(1000)}
        content = {"__author__": "torchvision", "matching_heuristics": True, "model": schemes.arrays(bare)}
    else:
        whole = {name: tensor for name, tensor in state.items() if "pixel_" not in name}
        whole |= {f"proposal_generator.anchor_generator.cell_anchors.{i}": torch.ones(3, 4) for i in range(5)}
        content = {"__author__": "Detectron2 Model Zoo", "model": schemes.arrays(whole)}
    schemes.write_pickle(path, content)


def _timm(path: Path, entry: ZooEntry, cfg: Config, state: State) -> None:
    theirs = schemes.torchvision_backbone(state)
    torch.save(OrderedDict(theirs | {"fc.weight": torch.ones(1000, 8), "fc.bias": torch.ones(1000)}), path)


def _mmdetection(path: Path, entry: ZooEntry, cfg: Config, state: State) -> None:
    if entry.kind == "backbone":
        theirs = schemes.torchvision_backbone(state, "gn") | {"fc.weight": torch.ones(1000, 8)}
        content = {"state_dict": OrderedDict(theirs)}
    else:
        text = MMDETECTIONS_CONFIG.format(
            groups=cfg.model.gn.num_groups,
            mean=list(cfg.model.pixel_mean),
            std=list(cfg.model.pixel_std),
            rgb=cfg.input.format == "RGB",
            conv="dict(type='ConvWS')" if cfg.model.resnets.conv else None,
        )
        meta = {"epoch": 24, "config": text, "CLASSES": ("person", "bicycle")}
        content = {"meta": meta, "state_dict": OrderedDict(schemes.mmdetection(state)), "optimizer": {}}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # older than PyTorch 1.6


def _bit(path: Path, entry: ZooEntry, cfg: Config, state: State) -> None:
    """big_transfer's names for those of timm."""
    leaves = {"weight": "gamma", "bias": "beta"}
    found = {"resnet/head/conv2d/bias": np.zeros(1000, np.float32)}
    for name, tensor in state.items():
        parts = name.removeprefix("backbone.bottom_up.trunk.").split(".")
        place = "resnet/root_block"
        if parts[0] == "stages":
            layer = "a/proj" if parts[4] == "downsample" else "abc"[int(parts[4][-1]) - 1]
            place = f"resnet/block{int(parts[1]) + 1}/unit{int(parts[3]) + 1:02d}/{layer}"
        if tensor.dim() == 4:
            found[f"{place}/standardized_conv2d/kernel"] = tensor.permute(2, 3, 1, 0).numpy()
        else:
            found[f"{place}/group_norm/{leaves[parts[-1]]}"] = tensor.numpy()
    np.savez(path, **found)


def _tensorpack(path: Path, entry: ZooEntry, cfg: Config, state: State) -> None:
    arrays = schemes.arrays(schemes.tensorpack(state))
    np.savez_compressed(path, **arrays, **{"global_step:0": np.array(5), "learning_rate:0": np.array(0.1)})
