"""The whole schema: detectron2's keys with its defaults, and keys of ours."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from .model import Model
from .types import (
    Bool,
    Count,
    Float,
    Fraction,
    Int,
    Ints,
    Lengths,
    Milestones,
    Names,
    NonNegative,
    Pair,
    Positive,
    PositiveInt,
    PossiblyInfinite,
    Section,
    Str,
    _from_text,
)

Sampling = Literal["choice", "range"]
CropType = Literal["relative_range", "relative", "absolute", "absolute_range"]


def _metric(name: str) -> str:
    if name != "auto" and not re.fullmatch(r"(bbox|segm)/\S.*", name):
        raise ValueError("must be 'auto' or such as 'bbox/AP', 'segm/AP50'")
    return name


class Crop(Section):
    """``INPUT.CROP``."""

    enabled: Bool = False
    type: CropType = "relative_range"
    size: Pair = (0.9, 0.9)  # (height, width): fractions, or pixels for the absolute types


class ColorJitter(Section):
    """``INPUT.COLOR_JITTER``, ours: strengths as in torchvision's ColorJitter."""

    enabled: Bool = False
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.4
    hue: Annotated[Float, Field(ge=0, le=0.5)] = 0.1


class LargeScaleJitter(Section):
    """``INPUT.LARGE_SCALE_JITTER``, ours (Ghiasi et al. 2021, arXiv 2012.07177); replaces the resize."""

    enabled: Bool = False
    min_scale: Positive = 0.1
    max_scale: Positive = 2.0
    size: Lengths = (1024, 1024)  # (height, width) pixels of the canvas


class Input(Section):
    """``INPUT``: how images are read, resized and augmented."""

    min_size_train: Lengths = (800,)
    min_size_train_sampling: Sampling = "choice"
    max_size_train: PositiveInt = 1333
    min_size_test: Count = 800  # 0: no resize
    max_size_test: PositiveInt = 1333
    random_flip: Literal["horizontal", "vertical", "none"] = "horizontal"
    crop: Crop = Crop()
    format: Str = "BGR"
    mask_format: Literal["polygon", "bitmask"] = "polygon"
    color_jitter: ColorJitter = ColorJitter()
    large_scale_jitter: LargeScaleJitter = LargeScaleJitter()


class RegisteredDataset(Section):
    """An entry of ``DATASETS.REGISTER``, ours: a COCO JSON and the folder of its images; keys in any case."""

    model_config = ConfigDict(populate_by_name=True)

    annotations: Str
    images: Str


class Datasets(Section):
    """``DATASETS``: names of datasets; ``REGISTER`` of ours adds names, ``ALLOW_OUTSIDE`` is ours."""

    train: Names = ()
    proposal_files_train: Names = ()
    precomputed_proposal_topk_train: Int = 2000
    test: Names = ()
    proposal_files_test: Names = ()
    precomputed_proposal_topk_test: Int = 1000
    allow_outside: Bool = False
    # Not "register", which every class has already.
    registered: Annotated[dict[str, RegisteredDataset], BeforeValidator(_from_text)] = Field(
        default={}, alias="REGISTER"
    )


class DataLoader(Section):
    """``DATALOADER``."""

    num_workers: Count = 4
    aspect_ratio_grouping: Bool = True
    sampler_train: Str = "TrainingSampler"
    repeat_threshold: Fraction = 0.0
    repeat_sqrt: Bool = True
    filter_empty_annotations: Bool = True


class ClipGradients(Section):
    """``SOLVER.CLIP_GRADIENTS``; the type ``full_model`` is ours: the norm of all gradients together."""

    enabled: Bool = False
    clip_type: Literal["value", "norm", "full_model"] = "value"
    clip_value: Positive = 1.0
    norm_type: PossiblyInfinite = 2.0


class AMP(Section):
    """``SOLVER.AMP``; ``DTYPE`` is ours. float16 scales the loss, bfloat16 need not."""

    enabled: Bool = False
    dtype: Literal["float16", "bfloat16"] = "float16"


class EMA(Section):
    """``SOLVER.EMA``, ours: an exponential moving average of the weights, which is evaluated and saved."""

    enabled: Bool = False
    decay: Annotated[Float, Field(gt=0, lt=1)] = 0.9998


class Solver(Section):
    """``SOLVER``; from ``OPTIMIZER`` on, the keys are ours."""

    lr_scheduler_name: Str = "WarmupMultiStepLR"
    max_iter: PositiveInt = 40000
    base_lr: Positive = 0.001
    base_lr_end: NonNegative = 0.0
    momentum: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    nesterov: Bool = False
    weight_decay: NonNegative = 0.0001
    weight_decay_norm: NonNegative = 0.0
    gamma: Positive = 0.1
    steps: Milestones = (30000,)
    num_decays: Int = 3
    warmup_factor: NonNegative = 1.0 / 1000
    warmup_iters: Count = 1000
    warmup_method: Literal["linear", "constant"] = "linear"
    rescale_interval: Bool = False
    checkpoint_period: Count = 5000
    ims_per_batch: PositiveInt = 16
    reference_world_size: Count = 0
    bias_lr_factor: NonNegative = 1.0
    weight_decay_bias: Annotated[NonNegative | None, BeforeValidator(_from_text)] = None
    clip_gradients: ClipGradients = ClipGradients()
    amp: AMP = AMP()
    optimizer: Literal["SGD", "AdamW"] = "SGD"
    betas: Annotated[Pair, AfterValidator(lambda pair: _below_one(pair))] = (0.9, 0.999)
    best_checkpoint_metric: Annotated[Str, AfterValidator(_metric)] = "auto"
    log_period: PositiveInt = 20
    accumulate: PositiveInt = 1  # parts of IMS_PER_BATCH that go through the model one after the other
    ema: EMA = EMA()
    non_finite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does


class Checkpoint(Section):
    """``CHECKPOINT``, ours: which checkpoints stay beside the best and the final one."""

    keep: Count = 0  # the newest so many; 0: all


def _below_one(pair: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= value < 1 for value in pair):
        raise ValueError("must be two numbers from 0 to below 1")
    return pair


class Augmentation(Section):
    """``TEST.AUG``."""

    enabled: Bool = False
    min_sizes: Ints = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
    max_size: Int = 4000
    flip: Bool = True


class PreciseBN(Section):
    """``TEST.PRECISE_BN``."""

    enabled: Bool = False
    num_iter: Int = 200


class Test(Section):
    """``TEST``; ``IMS_PER_BATCH`` and ``COCO_EVAL_BACKEND`` are ours."""

    expected_results: Annotated[tuple[Any, ...], BeforeValidator(_from_text)] = ()
    eval_period: Count = 0
    keypoint_oks_sigmas: Annotated[tuple[Float, ...], BeforeValidator(_from_text)] = ()
    detections_per_image: PositiveInt = 100
    aug: Augmentation = Augmentation()
    precise_bn: PreciseBN = PreciseBN()
    ims_per_batch: PositiveInt = 1
    coco_eval_backend: Literal["auto", "hotcoco", "faster_coco_eval", "pycocotools"] = "auto"


class Vis(Section):
    """``VIS``, ours: pictures drawn after the final evaluation."""

    num_images: Count = 8


class Global(Section):
    """``GLOBAL``: detectron2's place for experiments."""

    hack: Float = 1.0


class Root(Section):
    """All keys."""

    version: Int = 2
    model: Model = Model()
    input: Input = Input()
    datasets: Datasets = Datasets()
    dataloader: DataLoader = DataLoader()
    solver: Solver = Solver()
    checkpoint: Checkpoint = Checkpoint()
    test: Test = Test()
    output_dir: Annotated[Str, Field(min_length=1)] = "./output"
    seed: Annotated[Int, Field(lt=2**31)] = -1  # negative: another one for each run
    cudnn_benchmark: Bool = False
    float32_precision: Literal["", "highest", "high", "medium"] = ""
    vis_period: Int = 0
    vis: Vis = Vis()
    global_: Global = Global()
