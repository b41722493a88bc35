"""detectron2's numbers: its weights, stage by stage, its losses and gradients.

Tolerances, and where they come from: float32 sums in another order differ by some 1e-6 relative; p2 is stored
in fp16 (5e-4). Everything here runs in both memory formats, which add up in different orders.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image
from torch import Tensor

from gn_detect.config import Config, load_config
from gn_detect.modeling import MaskRCNN, build_model
from gn_detect.structures import Target


@pytest.fixture(scope="module")
def oracle(shared_dir: Path) -> Path:
    return shared_dir / "oracles/dsb_r18_gn"


@pytest.fixture(scope="module")
def config(oracle: Path) -> Config:
    return load_config(oracle / "config.yaml")


@pytest.fixture(scope="module", params=[False, True], ids=["NCHW", "channels_last"])
def model(request: pytest.FixtureRequest, oracle: Path, config: Config) -> MaskRCNN:
    model = build_model(config.replace({"MODEL.CHANNELS_LAST": request.param, "MODEL.DEVICE": "cpu"}))
    weights = torch.load(oracle / "model_final.pth", weights_only=True)["model"]
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model


@pytest.fixture(scope="module")
def expected(oracle: Path) -> dict[str, np.ndarray]:
    with np.load(oracle / "inference_first_val_image.npz") as stored:
        return dict(stored)


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference over the largest value."""
    reference = torch.from_numpy(theirs.astype(np.float32)).view(ours.shape)
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def test_inference_stage_by_stage(model: MaskRCNN, expected: dict[str, np.ndarray]) -> None:
    model.eval()
    image = torch.from_numpy(expected["image_resized_uint8"]).permute(2, 0, 1)
    size = (image.shape[1], image.shape[2])
    batch = model.preprocess([image])
    assert relative(batch, expected["normalized_padded"]) < 1e-6
    features = model.backbone(batch)
    for name, feature in features.items():
        assert relative(feature, expected[f"feat_{name}"]) < (5e-4 if name == "p2" else 1e-4), name

    rpn, heads = model.proposal_generator, model.roi_heads
    levels = [features[name] for name in rpn.in_features]
    anchors = rpn.anchor_generator([level.shape[-2:] for level in levels])
    logits, _ = rpn.rpn_head(levels)
    for i, (logit, boxes) in enumerate(zip(logits, anchors, strict=True)):
        stored = torch.from_numpy(expected[f"rpn_logits_{i}"]).permute(0, 2, 3, 1)
        assert relative(logit.view(stored.shape), stored.numpy()) < 1e-4
        assert np.array_equal(boxes[:16].numpy(), expected[f"anchors_{i}_first16"])

    (proposals,) = rpn.propose(features, [size])
    assert proposals.shape == (1000, 4)
    stored_proposals = torch.from_numpy(expected["proposals"])
    # Proposals of nearly equal scores may change places.
    distance = torch.cdist(proposals, stored_proposals, p=torch.inf)
    assert distance.amin(dim=1).max() < 0.05
    assert distance.amin(dim=0).max() < 0.05
    pooled = heads.box_pooler(heads.levels(features), [stored_proposals])
    assert relative(pooled[:8], expected["roi_feat_first8"]) < 1e-4
    hidden = heads.box_head(pooled)
    assert relative(hidden[:64], expected["box_head_first64"]) < 1e-4
    class_logits, deltas = heads.box_predictor(hidden)
    assert relative(class_logits, expected["cls_logits"]) < 1e-4
    assert relative(deltas, expected["box_deltas"]) < 1e-4


def test_detections_and_masks(model: MaskRCNN, expected: dict[str, np.ndarray]) -> None:
    model.eval()
    image = torch.from_numpy(expected["image_resized_uint8"]).permute(2, 0, 1)
    (found,) = model.detect([image])
    assert len(found) == len(expected["boxes"])
    torch.testing.assert_close(found.boxes, torch.from_numpy(expected["boxes"]), rtol=0, atol=0.05)
    torch.testing.assert_close(found.scores, torch.from_numpy(expected["scores"]), rtol=0, atol=1e-4)
    assert found.labels.tolist() == expected["classes"].tolist()
    masks = torch.from_numpy(np.unpackbits(expected["masks_packed"], axis=-1).astype(bool))
    overlap = (masks & found.masks).sum((1, 2)) / (masks | found.masks).sum((1, 2)).clamp(min=1)
    assert overlap.min() >= 0.999


def load_training_sample(folder: Path, name: str, config: Config) -> tuple[Tensor, Target]:
    """One train image at the network's resolution, read here without the package's own loader."""
    annotations = json.loads((folder / "annotations/instances_train.json").read_text())
    record = next(record for record in annotations["images"] if record["file_name"] == name)
    objects = [a for a in annotations["annotations"] if a["image_id"] == record["id"]]
    with Image.open(folder / "images" / name) as file:
        image = file.convert("RGB")
    width, height = image.size
    scale = config.input.min_size_train[0] / min(height, width)
    scale = min(scale, config.input.max_size_train / max(height, width))
    new_width, new_height = int(width * scale + 0.5), int(height * scale + 0.5)
    pixels = np.asarray(image.resize((new_width, new_height), Image.Resampling.BILINEAR))[:, :, ::-1].copy()
    factor = torch.tensor([new_width / width, new_height / height] * 2, dtype=torch.float64)
    boxes = (
        torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)]).double() * factor
    )
    masks = [
        Image.fromarray(coco_mask.decode(a["segmentation"])).resize(
            (new_width, new_height), Image.Resampling.NEAREST
        )
        for a in objects
    ]
    bitmaps = [torch.from_numpy(np.asarray(mask).astype(bool)) for mask in masks]
    target = Target(boxes.float(), torch.zeros(len(objects), dtype=torch.int64), bitmaps)
    return torch.from_numpy(pixels).permute(2, 0, 1), target


def test_losses_and_gradients(model: MaskRCNN, oracle: Path, shared_dir: Path, config: Config) -> None:
    """Every anchor and proposal is sampled, so that nothing is random.

    A pixel of a mask target that lies at the threshold falls to either side by the order of a sum, and the
    CPU's vector instructions decide that order. Each such pixel moves the gradient of the mask predictor's
    bias, a mean over the pixels, by 1 / pixels. With the instructions of older CPUs
    (``ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41``) one of 84,672 pixels moves; three may.
    """
    stored = json.loads((oracle / "training_losses.json").read_text())
    samples = [load_training_sample(shared_dir / "data/dsb2018", name, config) for name in stored["images"]]
    rpn, heads = model.proposal_generator, model.roi_heads
    settings = rpn.settings, heads.settings
    every_sample = {"batch_size_per_image": 10**6, "positive_fraction": 1.0}
    rpn.settings, heads.settings = (s.model_copy(update=every_sample) for s in settings)
    shapes: list[torch.Size] = []
    hook = heads.mask_head.predictor.register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    try:
        model.train()
        model.zero_grad()
        losses = model.losses([image for image, _ in samples], [target for _, target in samples])
        sum(losses.values()).backward()
    finally:
        rpn.settings, heads.settings = settings
        hook.remove()
    for name, value in stored["losses"].items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(stored["grad_norm_and_sum"]) == set(gradients)
    pixels = shapes[0].numel()
    for name, (norm, _) in stored["grad_norm_and_sum"].items():
        flipped = 3 / pixels if name == "roi_heads.mask_head.predictor.bias" else None
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=flipped), name
