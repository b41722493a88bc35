"""What each key does, one line each; ``gn-detect config explain`` and docs/config.md print them."""

from __future__ import annotations

DESCRIPTIONS = {
    "VERSION": "Version of detectron2's config format.",
    "OUTPUT_DIR": "Folder of the run: config, log, metrics, checkpoints, results, pictures.",
    "SEED": (
        "Seed of the weights, the order of images and the augmentation; negative: another one for each run, "
        "and written down."
    ),
    "CUDNN_BENCHMARK": "Let cuDNN time its algorithms; helps where all inputs have one size.",
    "FLOAT32_PRECISION": (
        "Precision of matrix products in float32 (PyTorch's set_float32_matmul_precision); empty: PyTorch's "
        "own."
    ),
    "MODEL.MASK_ON": "Mask R-CNN; False: Faster R-CNN, boxes alone.",
    "MODEL.DEVICE": "auto is cuda where there is a GPU, else cpu; or cpu, cuda, cuda:N.",
    "MODEL.WEIGHTS": (
        "Checkpoint to start from or to evaluate: a file, zoo://NAME, detectron2://..., https://...; empty: "
        "random weights."
    ),
    "MODEL.PIXEL_MEAN": "Mean, subtracted from pixels of 0 to 255, in the order of INPUT.FORMAT.",
    "MODEL.PIXEL_STD": "Deviation, by which pixels are divided, in the order of INPUT.FORMAT.",
    "MODEL.CHANNELS_LAST": "Memory format of backbone and heads; auto: channels-last to train on a CPU.",
    "MODEL.COMPILE": "torch.compile of backbone and FPN in training.",
    "MODEL.GN.NUM_GROUPS": (
        "Groups of every norm that is called GN: exactly so many, which must divide its channels; at most so "
        "many with MIN_CHANNELS_PER_GROUP above 1."
    ),
    "MODEL.GN.MIN_CHANNELS_PER_GROUP": (
        "Above 1: least channels in a group, so that narrow layers get fewer groups; 16 in models that "
        "gn-detect convert makes by default."
    ),
    "MODEL.GN.EPS": "Added to the variance of every GN; weights that tell their norms' eps bring it along.",
    "MODEL.BACKBONE.NAME": (
        "build_resnet_fpn_backbone has a feature pyramid, build_resnet_backbone (C4, DC5) none."
    ),
    "MODEL.BACKBONE.FREEZE_AT": (
        "Parts that are not trained: 0 none, 1 the stem, 2 the stem and res2, ...; set it to 0 to train from "
        "random weights (gn-detect train without --config-file does)."
    ),
    "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING": "Compute blocks twice in training, for less memory.",
    "MODEL.RESNETS.DEPTH": "Layers of the ResNet.",
    "MODEL.RESNETS.OUT_FEATURES": "Stages that the backbone returns; the last of them is its end.",
    "MODEL.RESNETS.NUM_GROUPS": (
        "Groups of the 3x3 convolutions (ResNeXt's cardinality); nothing to do with GN."
    ),
    "MODEL.RESNETS.NORM": "Norm of the backbone.",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "Channels of the 3x3 convolutions of res2, for each group.",
    "MODEL.RESNETS.STRIDE_IN_1X1": (
        "Stride of a bottleneck on its first 1x1 (True: MSRA weights) or on its 3x3 (False: GN's and "
        "torchvision's)."
    ),
    "MODEL.RESNETS.RES5_DILATION": "2 keeps res5 at stride 16 (DC5).",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": (
        "Channels of res2, doubled from stage to stage; 64 in ResNet-18 and 34."
    ),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "Channels of the stem.",
    "MODEL.FPN.IN_FEATURES": "Stages that the pyramid is made of.",
    "MODEL.FPN.OUT_CHANNELS": "Channels of each level of the pyramid.",
    "MODEL.FPN.NORM": "Norm of the pyramid.",
    "MODEL.FPN.FUSE_TYPE": "How a level and the one above it are joined.",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": (
        "Proposals with a side of so many pixels of the network's input, or fewer, are dropped."
    ),
    "MODEL.ANCHOR_GENERATOR.SIZES": (
        "Square roots of anchor areas, pixels of the network's input: a list for each level, or one for all."
    ),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (
        "Height / width of anchors: a list for each level, or one for all."
    ),
    "MODEL.ANCHOR_GENERATOR.OFFSET": "Position of the first anchor's centre, in strides.",
    "MODEL.RPN.IN_FEATURES": "Features in which the RPN looks for objects.",
    "MODEL.RPN.BOUNDARY_THRESH": "Pixels that an anchor may stick out of the image in training; -1: any.",
    "MODEL.RPN.IOU_THRESHOLDS": "IoU that divide anchors into the IOU_LABELS.",
    "MODEL.RPN.IOU_LABELS": "0 background, -1 left out, 1 object, for each range of IOU_THRESHOLDS.",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": "Anchors of each image that count in the loss.",
    "MODEL.RPN.POSITIVE_FRACTION": "Largest part of these anchors that are objects.",
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": "Weight of the RPN's box loss beside its classification.",
    "MODEL.RPN.BBOX_REG_WEIGHTS": "Factors of the box deltas dx, dy, dw, dh.",
    "MODEL.RPN.SMOOTH_L1_BETA": "Where smooth L1 becomes L1; 0: L1.",
    "MODEL.RPN.LOSS_WEIGHT": "Weight of both RPN losses.",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "Proposals of each level before NMS, in training.",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "The same in evaluation and prediction.",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "Proposals of each image after NMS, in training.",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "The same in evaluation and prediction.",
    "MODEL.RPN.NMS_THRESH": "IoU from which the weaker of two proposals is dropped.",
    "MODEL.RPN.CONV_DIMS": "Channels of the RPN's 3x3 convolutions; -1: as many as the input has.",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads (FPN, DC5) or Res5ROIHeads (C4).",
    "MODEL.ROI_HEADS.NUM_CLASSES": "Categories, without the background.",
    "MODEL.ROI_HEADS.IN_FEATURES": "Features that RoIs are pooled from.",
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": "IoU that divide proposals into the IOU_LABELS.",
    "MODEL.ROI_HEADS.IOU_LABELS": "0 background, -1 left out, 1 object, for each range of IOU_THRESHOLDS.",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "RoIs of each image that count in the loss.",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": "Largest part of these RoIs that are objects.",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "Least score of a detection.",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "IoU from which the weaker of two detections of a class is dropped.",
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": "Ground truth is among the proposals in training.",
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead with StandardROIHeads.",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": "Weight of the box loss.",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "Factors of the box deltas dx, dy, dw, dh.",
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": "Where smooth L1 becomes L1; 0: L1.",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": "Cells on each side of a pooled RoI.",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "Samples on each side of a cell; 0: as many as fit.",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": (
        "ROIAlignV2 is aligned by half a pixel, ROIAlign is Detectron's and torchvision's."
    ),
    "MODEL.ROI_BOX_HEAD.NUM_FC": (
        "Fully connected layers of the box head; the paper has 1 behind 4 convolutions."
    ),
    "MODEL.ROI_BOX_HEAD.FC_DIM": "Outputs of each fully connected layer.",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": "Convolutions before the fully connected layers; 4 in the paper.",
    "MODEL.ROI_BOX_HEAD.CONV_DIM": "Channels of these convolutions.",
    "MODEL.ROI_BOX_HEAD.NORM": "Norm of the box head's convolutions.",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": "One box for each RoI instead of one for each class.",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": "Cells on each side of a pooled RoI; masks have twice as many.",
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": "Samples on each side of a cell; 0: as many as fit.",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": "Convolutions of the mask head before the upsampling.",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "Channels of these convolutions and of the upsampling.",
    "MODEL.ROI_MASK_HEAD.NORM": "Norm of the mask head's convolutions.",
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": "One mask for each RoI instead of one for each class.",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "As MODEL.ROI_BOX_HEAD.POOLER_TYPE.",
    "INPUT.MIN_SIZE_TRAIN": "Lengths of the shorter side in training, pixels; one is drawn for each image.",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice: one of MIN_SIZE_TRAIN; range: anything between its two.",
    "INPUT.MAX_SIZE_TRAIN": "Limit of the longer side in training, pixels.",
    "INPUT.MIN_SIZE_TEST": "Length of the shorter side in evaluation and prediction, pixels; 0: no resize.",
    "INPUT.MAX_SIZE_TEST": "Limit of the longer side in evaluation and prediction, pixels.",
    "INPUT.RANDOM_FLIP": "Mirror half of the training images.",
    "INPUT.CROP.ENABLED": "Train on random crops; each keeps at least one object.",
    "INPUT.CROP.TYPE": "How SIZE is meant: fractions of the image or pixels, exact or the least of a range.",
    "INPUT.CROP.SIZE": "(height, width) of the crop.",
    "INPUT.FORMAT": "Order of the channels that the weights want.",
    "INPUT.MASK_FORMAT": (
        "polygon keeps polygons and rasterises them in each RoI; bitmask draws them in the image."
    ),
    "INPUT.COLOR_JITTER.ENABLED": (
        "Random brightness, contrast, saturation and hue, as torchvision's ColorJitter."
    ),
    "INPUT.COLOR_JITTER.BRIGHTNESS": "Strength of the change of brightness, 0.4: by a factor of 0.6 to 1.4.",
    "INPUT.COLOR_JITTER.CONTRAST": "Strength of the change of contrast, 0.4: by a factor of 0.6 to 1.4.",
    "INPUT.COLOR_JITTER.SATURATION": "Strength of the change of saturation, 0.4: by a factor of 0.6 to 1.4.",
    "INPUT.COLOR_JITTER.HUE": "Strength of the change of hue, up to 0.5 (half the circle).",
    "INPUT.LARGE_SCALE_JITTER.ENABLED": (
        "Resize by a random factor and cut or pad to SIZE (arXiv 2012.07177), instead of MIN_SIZE_TRAIN."
    ),
    "INPUT.LARGE_SCALE_JITTER.MIN_SCALE": "Least factor of the resize.",
    "INPUT.LARGE_SCALE_JITTER.MAX_SCALE": "Largest factor of the resize.",
    "INPUT.LARGE_SCALE_JITTER.SIZE": "(height, width) of the canvas, pixels.",
    "DATASETS.TRAIN": "Names of the datasets to train on, joined.",
    "DATASETS.TEST": "Names of the datasets to evaluate on, each by itself.",
    "DATASETS.ALLOW_OUTSIDE": "Read images that an annotation file names by an absolute path, or "
    "with `..` in it: its author then chooses which files of this machine are opened.",
    "DATASETS.REGISTER": "Names of your own: {name: {annotations: COCO JSON, images: folder}}.",
    "DATALOADER.NUM_WORKERS": "Processes of the loader; 0: none.",
    "DATALOADER.ASPECT_RATIO_GROUPING": "Wide and tall images go into different batches.",
    "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler repeats images of rare categories.",
    "DATALOADER.REPEAT_THRESHOLD": "Share of the images below which a category is rare.",
    "DATALOADER.REPEAT_SQRT": "Repeat by the square root of the shortage (LVIS).",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "Leave out training images without objects.",
    "SOLVER.LR_SCHEDULER_NAME": "Learning rate: falls at STEPS, or by half a cosine down to BASE_LR_END.",
    "SOLVER.MAX_ITER": "Iterations, each of IMS_PER_BATCH images.",
    "SOLVER.BASE_LR": "Learning rate for IMS_PER_BATCH images; detectron2's schedules have 0.02 for 16.",
    "SOLVER.BASE_LR_END": "Last learning rate of the cosine.",
    "SOLVER.MOMENTUM": "Momentum of SGD.",
    "SOLVER.NESTEROV": "Nesterov's momentum in SGD.",
    "SOLVER.WEIGHT_DECAY": "Weight decay of all parameters but those of norms.",
    "SOLVER.WEIGHT_DECAY_NORM": "Weight decay of the parameters of norms; 0 matters for GN (the paper).",
    "SOLVER.GAMMA": "Factor of the learning rate at each of STEPS.",
    "SOLVER.STEPS": "Iterations after which the learning rate falls.",
    "SOLVER.WARMUP_FACTOR": "First learning rate as a part of BASE_LR.",
    "SOLVER.WARMUP_ITERS": "Iterations until BASE_LR is reached.",
    "SOLVER.WARMUP_METHOD": "Warm-up: linear rises; constant stays at WARMUP_FACTOR.",
    "SOLVER.CHECKPOINT_PERIOD": "Iterations between checkpoints; 0: the final one alone.",
    "SOLVER.IMS_PER_BATCH": "Images of an iteration, over all processes.",
    "SOLVER.REFERENCE_WORLD_SIZE": (
        "Processes that batch and schedule are for; other numbers scale both. 0: no scaling."
    ),
    "SOLVER.BIAS_LR_FACTOR": "Factor of the learning rate of biases.",
    "SOLVER.WEIGHT_DECAY_BIAS": "Weight decay of biases; none: that of their layer's weights.",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "Limit gradients.",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": (
        "Limit each value, each parameter's norm, or the norm of all together."
    ),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "The limit of value or norm.",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "p of the norm: 2 is the Euclidean one.",
    "SOLVER.AMP.ENABLED": "Mixed precision.",
    "SOLVER.AMP.DTYPE": "float16 with a loss scaler, or bfloat16.",
    "SOLVER.OPTIMIZER": "SGD or AdamW.",
    "SOLVER.BETAS": "The two betas of AdamW.",
    "SOLVER.BEST_CHECKPOINT_METRIC": (
        "Metric that decides about model_best.pth, such as segm/AP or bbox/AP-person; auto: segm/AP, or "
        "bbox/AP without masks."
    ),
    "SOLVER.LOG_PERIOD": "Iterations between log lines.",
    "SOLVER.ACCUMULATE": (
        "Parts of IMS_PER_BATCH that go through the model one after the other: less memory, the same update."
    ),
    "SOLVER.EMA.ENABLED": "Keep a moving average of the weights, which is evaluated and saved.",
    "SOLVER.EMA.DECAY": (
        "Part of the average that stays at each iteration; at first less: (1 + n) / (10 + n) after n."
    ),
    "SOLVER.NON_FINITE": "Stop at, or skip, a step whose loss or gradient is not finite.",
    "CHECKPOINT.KEEP": "Newest checkpoints that stay beside the best and the final one; 0: all.",
    "TEST.EVAL_PERIOD": "Iterations between evaluations; 0: at the end alone.",
    "TEST.DETECTIONS_PER_IMAGE": "Limit of the detections of an image; COCO's AP counts 100.",
    "TEST.IMS_PER_BATCH": "Images that are read and evaluated together, by each process.",
    "TEST.COCO_EVAL_BACKEND": "Which library computes AP; all give the same numbers.",
    "VIS.NUM_IMAGES": "Pictures drawn after the final evaluation.",
}
"""Key -> text. Keys with one value that is implemented need none."""
