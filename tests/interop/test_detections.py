"""A checkpoint of either library, in every format that both read, finds the same objects in both."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gn_detect import load_config
from gn_detect.config import Config
from gn_detect.data import prepare_image
from gn_detect.engine import Predictor
from gn_detect.export.parity import compare
from gn_detect.interop import detectron2 as partner
from gn_detect.structures import Detections
from gn_detect.weights import read_checkpoint, save_weights
from tests.cli.test_export import decided_weights
from tests.weights.schemes import as_detectron, with_affine_norms

pytest.importorskip("detectron2", reason="needs detectron2, which is not installed here")

TRAINED = "nuclei, R-18-FPN with GN"
CONFIGS = {
    "R-50-FPN with GN": "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml",
    "R-50-FPN with frozen BN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "R-50-FPN cascade with frozen BN": "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml",
    "R-50-FPN with SyncBN": "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml",
    "R-50-C4 with frozen BN": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "R-50-FPN deformable with frozen BN": "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
    "X-152's recipe at depth 50": "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml",
}
SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "INPUT.MIN_SIZE_TEST", 224,
    "INPUT.MAX_SIZE_TEST", 400,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 100,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.02,
    "TEST.DETECTIONS_PER_IMAGE", 20,
]  # fmt: skip

FILES = ("ours.pth", "ours.pkl", "theirs.pth", "theirs.pkl", "caffe2.pkl")


def configs_of(name: str, shared: Path, folder: Path) -> tuple[Any, Config]:
    """detectron2's, and ours from the file that it writes."""
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    if name == TRAINED:
        theirs = get_cfg()
        theirs.merge_from_file(str(shared / "oracles/dsb_r18_gn/config.yaml"))
        theirs.merge_from_list(SMALL[:4])
    else:
        theirs = model_zoo.get_config(CONFIGS[name])
        theirs.merge_from_list([*SMALL, "MODEL.RESNETS.DEPTH", 50])
    (folder / "config.yaml").write_text(theirs.dump())
    return theirs, load_config(folder / "config.yaml")


def their_predictor(cfg: Any, weights: Path) -> Callable[[np.ndarray], Detections]:
    """RGB pixels -> detections."""
    from detectron2.engine import DefaultPredictor

    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.WEIGHTS", str(weights)])
    predictor = DefaultPredictor(cfg)
    return lambda rgb: partner.as_detections(predictor(rgb[:, :, ::-1])["instances"])


def write(path: Path, cfg: Any, state: dict[str, Tensor]) -> None:
    """``state`` as each library's own code saves it; Caffe2's, whose writer is gone, by hand."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    if path.name.startswith("ours"):
        save_weights(path, state)
    elif path.name == "theirs.pth":
        model = build_model(cfg)
        model.load_state_dict(state, strict=False)
        DetectionCheckpointer(model, str(path.parent)).save("theirs")
    elif path.name == "theirs.pkl":  # as those of its model zoo
        content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "somebody"}
        path.write_bytes(pickle.dumps(content))
    else:
        blobs = {name: value.numpy() for name, value in as_detectron(state).items()}
        path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [TRAINED, *CONFIGS])
def test_both_find_the_same(name: str, threads: int, shared_dir: Path, tmp_path: Path) -> None:
    """By default to the last bit, on the CPU and in fp32; any bit less would turn over pixels of masks."""
    theirs, ours = configs_of(name, shared_dir, tmp_path)
    if name == TRAINED:
        state = read_checkpoint(shared_dir / "oracles/dsb_r18_gn/model_final.pth").tensors
        images = sorted((shared_dir / "data/dsb2018/images").iterdir())[:6]
    else:
        decided_weights(ours, tmp_path / "decided.pth", head=0.05)
        state = read_checkpoint(tmp_path / "decided.pth").tensors
        images = sorted((shared_dir / "data/coco80/images").iterdir())[:4]
    for file in FILES if threads == 1 else FILES[:1]:  # they hold the same values
        if file == "caffe2.pkl":
            if name == TRAINED or "cascade" in name or "SyncBN" in name:  # Detectron had none of these
                continue
            state = with_affine_norms(state)
        path = tmp_path / file
        write(path, theirs, state)
        predictor = Predictor(ours.replace({"MODEL.WEIGHTS": str(path)}))
        assert not predictor.report.missing
        assert not predictor.report.unexpected
        parity = compare(predictor, their_predictor(theirs, path), images)
        print(f"{name}, {file}, threads {threads}: {parity}")
        assert (parity.unequal, parity.box, parity.score, parity.mask) == ([], 0, 0, 1), str(parity)
        assert parity.detections >= 40
        path.unlink()


@pytest.mark.parametrize("name", [name for name in (TRAINED, *CONFIGS) if "SyncBN" not in name])
def test_both_find_the_same_with_augmentation(name: str, shared_dir: Path, tmp_path: Path) -> None:
    """Both make each view by Pillow from the image of ``INPUT.MIN_SIZE_TEST``, and batch three views."""
    from detectron2.modeling import GeneralizedRCNNWithTTA, build_model

    theirs, ours = configs_of(name, shared_dir, tmp_path)
    keys = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (160, 224), "TEST.AUG.MAX_SIZE": 320}
    theirs.merge_from_list([item for pair in keys.items() for item in pair])
    if name == TRAINED:
        path, images = shared_dir / "oracles/dsb_r18_gn/model_final.pth", "data/dsb2018/images"
    else:
        path, images = tmp_path / "model.pth", "data/coco80/images"
        decided_weights(ours, path, head=0.05)
    predictor = Predictor(ours.replace(keys | {"MODEL.WEIGHTS": str(path)}))
    model = build_model(theirs).eval()
    model.load_state_dict(read_checkpoint(path).tensors, strict=False)
    augmented = GeneralizedRCNNWithTTA(theirs, model)

    def detect(rgb: np.ndarray) -> Detections:
        given = prepare_image(rgb, ours)
        with torch.no_grad():
            (found,) = augmented([{"image": given, "height": rgb.shape[0], "width": rgb.shape[1]}])
        return partner.as_detections(found["instances"])

    parity = compare(predictor, detect, sorted((shared_dir / images).iterdir())[:3])
    print(f"{name}: {parity}")
    assert (parity.unequal, parity.box, parity.score, parity.mask) == ([], 0, 0, 1), str(parity)
    assert parity.detections >= 30
