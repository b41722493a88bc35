"""Our state dicts in the names and layouts of other libraries, written down independently of the reader."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]

LAST_BLOCK = {50: {2: 2, 3: 3, 4: 5, 5: 2}, 101: {2: 2, 3: 3, 4: 22, 5: 2}}
BRANCH = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}


def randomised(model: torch.nn.Module, seed: int = 0) -> State:
    """Values that are all different, and positive where they are variances."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or "pixel_" in name or "cell_anchors" in name:
            state[name] = tensor.clone()
        elif name.endswith("running_var"):
            state[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            state[name] = torch.randn(tensor.shape, generator=generator) * 0.05
    return state


def with_affine_norms(state: State) -> State:
    """Statistics as after folding: Caffe2's files hold scale and shift alone."""
    state = dict(state)
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            state[name] = torch.zeros_like(tensor)
        elif name.endswith("running_var"):
            state[name] = torch.ones_like(tensor)
    return state


def background_first(name: str, tensor: Tensor) -> Tensor:
    """Class layers as Detectron, torchvision and mmdetection 1 have them."""
    if ".cls_score." in name:
        return torch.cat([tensor[-1:], tensor[:-1]])
    if ".bbox_pred." in name:
        return torch.cat([torch.full_like(tensor[:4], 7.0), tensor])
    if ".mask_head.predictor." in name:
        return torch.cat([torch.full_like(tensor[:1], 7.0), tensor])
    return tensor


def as_detectron(state: State, depth: int = 50, whole_norms: bool = False) -> State:
    """Caffe2 blobs; a backbone alone, or a whole model.

    Args:
        whole_norms: BatchNorms with statistics, as in detectron2's copies; Detectron's are scale and shift.
    """
    frozen = any(name.endswith("running_mean") for name in state)
    pyramid = "_fpn2" if any("fpn_lateral" in name for name in state) else ""
    blobs = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked") or "pixel_" in name:
            continue
        if name.endswith(("running_mean", "running_var")):
            if whole_norms:
                layer, _, leaf = name.rpartition(".")
                short = _detectron(f"{layer}.weight", depth, frozen, pyramid)
                blobs[short.removesuffix("_s") + f"_{leaf}"] = tensor
            continue
        theirs = _detectron(name, depth, frozen, pyramid)
        if whole_norms and ".norm." in name:
            theirs = theirs.removesuffix("_s").removesuffix("_b") + (
                "_gamma" if theirs.endswith("_s") else "_beta"
            )
        blobs[theirs] = background_first(name, tensor)
    return blobs


def _detectron(name: str, depth: int, frozen: bool, pyramid: str) -> str:
    layer, _, leaf = name.rpartition(".")
    end = {"weight": "_w", "bias": "_b"}[leaf]
    if layer.endswith(".norm"):
        layer = layer.removesuffix(".norm")
        end = {"weight": "_s", "bias": "_b"}[leaf]
        end = ("_bn" if frozen else "_gn") + end
    for prefix in (
        "backbone.bottom_up.",
        "backbone.",
        "roi_heads.res5.",
        "roi_heads.",
        "proposal_generator.rpn_head.",
    ):
        if layer.startswith(prefix):
            layer = layer.removeprefix(prefix)
            if prefix == "roi_heads.res5.":
                layer = f"res5.{layer}"
            break
    parts = layer.split(".")
    if layer == "stem.conv1":
        return ("res_conv1" if end.startswith("_bn") else "conv1") + end
    if parts[0].startswith("res"):
        return f"{parts[0]}_{parts[1]}_{BRANCH[parts[2]]}{end}"
    if layer.startswith("fpn_"):
        level = int(layer[-1])
        block = f"res{level}_{LAST_BLOCK[depth][level]}_sum"
        if layer.startswith("fpn_output"):
            return f"fpn_{block}{end}"
        return f"fpn_inner_{block}{'' if level == 5 else '_lateral'}{end}"
    named = {
        "conv": f"conv_rpn{pyramid}",
        "objectness_logits": f"rpn_cls_logits{pyramid}",
        "anchor_deltas": f"rpn_bbox_pred{pyramid}",
        "box_head.fc1": "fc6",
        "box_head.fc2": "fc7",
        "box_predictor.cls_score": "cls_score",
        "box_predictor.bbox_pred": "bbox_pred",
        "mask_head.deconv": "conv5_mask",
        "mask_head.predictor": "mask_fcn_logits",
    }
    if layer in named:
        return named[layer] + end
    if layer.startswith("box_head.conv"):
        return f"head_conv{layer.removeprefix('box_head.conv')}{end}"
    assert layer.startswith("mask_head.mask_fcn"), layer
    return f"_[mask]_fcn{layer.removeprefix('mask_head.mask_fcn')}{end}"


def torchvision_backbone(state: State, norm: str = "bn") -> State:
    """``conv1.weight``, ``bn1.weight``, ``layer1.0.downsample.0.weight``; timm's; "gn": mmdetection's."""
    found = {}
    for name, tensor in state.items():
        name = name.removeprefix("backbone.bottom_up.")
        if name.startswith("stem.conv1."):
            found[name.replace("stem.conv1.norm.", f"{norm}1.").replace("stem.conv1.", "conv1.")] = tensor
        elif name.startswith("res"):
            stage, block, layer, rest = name.split(".", 3)
            if layer == "shortcut":
                layer = "downsample.1" if rest.startswith("norm.") else "downsample.0"
                rest = rest.removeprefix("norm.")
            elif rest.startswith("norm."):
                layer, rest = f"{norm}{layer[-1]}", rest.removeprefix("norm.")
            found[f"layer{int(stage[3]) - 1}.{block}.{layer}.{rest}"] = tensor
    return found


def mmdetection(state: State, version: int = 2, norm: str = "gn") -> State:
    """A whole detector, with an FPN or without."""
    head = "roi_head." if version >= 2 else ""
    found = {f"backbone.{name}": tensor for name, tensor in torchvision_backbone(state, norm).items()}
    res5 = {name.removeprefix("roi_heads."): tensor for name, tensor in state.items() if ".res5." in name}
    if "roi_heads.res5.0.conv1.weight" in state:
        plain = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
        body = torchvision_backbone(
            {name: t for name, t in plain.items() if name[:3] in ("ste", "res")}, norm
        )
        found = {f"backbone.{name}": tensor for name, tensor in body.items()}
        shared = torchvision_backbone(res5, norm)
        found |= {f"{head}shared_head.{name}": tensor for name, tensor in shared.items()}
    for name, tensor in state.items():
        if "bottom_up" in name or "pixel_" in name or ".res" in name or ".stem." in name:
            continue
        if version < 2:
            tensor = background_first(name, tensor)
        layer, _, leaf = name.rpartition(".")
        wrapped = f"{norm}.{leaf}" if layer.endswith(".norm") else f"conv.{leaf}"
        layer = layer.removesuffix(".norm")
        if layer.startswith("backbone.fpn_"):
            kind = "lateral_convs" if "lateral" in layer else "fpn_convs"
            found[f"neck.{kind}.{int(layer[-1]) - 2}.{wrapped}"] = tensor
        elif layer.startswith("proposal_generator."):
            short = {"conv": "rpn_conv", "objectness_logits": "rpn_cls", "anchor_deltas": "rpn_reg"}
            found[f"rpn_head.{short[layer.split('.')[2]]}.{leaf}"] = tensor
        elif layer.startswith("roi_heads.box_head.conv"):
            found[f"{head}bbox_head.shared_convs.{int(layer[-1]) - 1}.{wrapped}"] = tensor
        elif layer.startswith("roi_heads.box_head.fc"):
            found[f"{head}bbox_head.shared_fcs.{int(layer[-1]) - 1}.{leaf}"] = tensor
        elif layer.startswith("roi_heads.box_predictor."):
            short = {"cls_score": "fc_cls", "bbox_pred": "fc_reg"}
            found[f"{head}bbox_head.{short[layer.split('.')[2]]}.{leaf}"] = tensor
        elif layer.startswith("roi_heads.mask_head.mask_fcn"):
            found[f"{head}mask_head.convs.{int(layer[-1]) - 1}.{wrapped}"] = tensor
        else:
            short = {"deconv": "upsample", "predictor": "conv_logits"}
            found[f"{head}mask_head.{short[layer.split('.')[2]]}.{leaf}"] = tensor
    return found


def backbone_of(state: State) -> State:
    """Layers of the backbone that a classifier has, with the prefix of a model with a pyramid."""
    return {
        name: tensor
        for name, tensor in state.items()
        if name.startswith("backbone.bottom_up.") and ".conv2_offset." not in name
    }


def write_pickle(path: Path, content: object, protocol: int = 2) -> None:
    """Pickle them like Python 2 or detectron2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def arrays(state: State) -> dict[str, object]:
    """NumPy arrays."""
    return {name: tensor.numpy() for name, tensor in state.items()}


def tensorpack(state: State) -> State:
    """A whole detector with an FPN: other layouts, the background first, ``:0`` as TensorFlow has it."""
    found = {}
    for name, tensor in state.items():
        if "pixel_" in name or name.endswith("num_batches_tracked"):
            continue
        layer, _, leaf = name.rpartition(".")
        if ".cls_score." in name or (".bbox_pred." in name and len(tensor) > 4):
            tensor = background_first(name, tensor)
        if tensor.dim() == 4:
            tensor = tensor.permute(2, 3, 1, 0)
        elif tensor.dim() == 2:
            tensor = tensor.t()
        is_norm = layer.endswith(".norm")
        end = {"weight": "gamma", "bias": "beta"}[leaf] if is_norm else {"weight": "W", "bias": "b"}[leaf]
        theirs = _tensorpack(layer.removesuffix(".norm"), is_norm)
        found[f"{theirs}/{end}:0"] = tensor.contiguous()
    return found


def _tensorpack(layer: str, is_norm: bool) -> str:
    parts = layer.split(".")
    if layer.startswith("backbone.bottom_up."):
        end = "/gn" if is_norm else ""
        if parts[2] == "stem":
            return f"conv0{end}"
        branch = "convshortcut" if parts[4] == "shortcut" else parts[4]
        return f"group{int(parts[2][3]) - 2}/block{parts[3]}/{branch}{end}"
    if layer.startswith("backbone.fpn_"):
        level, kind = layer[-1], "lateral" in layer
        if is_norm:
            return f"fpn/gn_{'c' if kind else 'p'}{level}"
        return f"fpn/lateral_1x1_c{level}" if kind else f"fpn/posthoc_3x3_p{level}"
    if layer.startswith("proposal_generator."):
        return f"rpn/{ {'conv': 'conv0', 'objectness_logits': 'class', 'anchor_deltas': 'box'}[parts[2]] }"
    if parts[1] == "mask_head":
        if parts[2].startswith("mask_fcn"):
            return f"maskrcnn/{'gn' if is_norm else 'fcn'}{int(parts[2][-1]) - 1}"
        return f"maskrcnn/{ {'deconv': 'deconv', 'predictor': 'conv'}[parts[2]] }"
    stage = f"cascade_rcnn_stage{int(parts[2]) + 1}" if parts[2].isdigit() else "fastrcnn"
    if parts[1] == "box_predictor":
        return f"{stage}/outputs/{ {'cls_score': 'class', 'bbox_pred': 'box'}[parts[-1]] }"
    head = f"{stage}/head" if parts[2].isdigit() else stage
    if parts[-1].startswith("conv"):
        return f"{head}/{'gn' if is_norm else 'conv'}{int(parts[-1][-1]) - 1}"
    return f"{head}/fc"
