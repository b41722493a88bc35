"""Mask R-CNN and Faster R-CNN: from images to losses, or to detections in the original pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..distributed.group import world_size
from ..ops import clip_boxes, normalize_images, paste_masks, scale_boxes
from ..structures import Detections, Target
from . import static
from .half_weights import half_weights
from .inputs import Inputs, send, send_images
from .roi_heads import RoIHeads
from .rpn import RPN


class MaskRCNN(nn.Module):
    """Two-stage detector and instance segmenter.

    Args:
        backbone: maps images (N, 3, H, W) to named feature maps.
        proposal_generator, roi_heads: first and second stage.
        pixel_mean, pixel_std: three values each, in the channel order of the images, 0..255.
        size_divisibility: images are padded to multiples of this number.
        channels_last: memory format of the convolutions.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        proposal_generator: RPN,
        roi_heads: RoIHeads,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.size_divisibility = size_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.use_memory_format(torch.channels_last if channels_last else torch.contiguous_format)

    @property
    def memory_format(self) -> torch.memory_format:
        """Return the format of weights and images. A bool is stored: ``torch.save`` cannot pickle formats."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def use_memory_format(self, memory_format: torch.memory_format) -> None:
        """Set the format of weights and images; parameters and gradients stay the same objects."""
        self.channels_last = memory_format == torch.channels_last
        for weight in self.parameters():
            if weight.dim() == 4:
                # Copied even where both formats fit, as with 1x1: PyTorch goes by the strides.
                weight.data = torch.empty_like(weight, memory_format=memory_format).copy_(weight.data)

    @contextlib.contextmanager
    def in_memory_format(self, memory_format: torch.memory_format) -> Iterator[None]:
        """Give the model this memory format inside the ``with`` block."""
        before = self.memory_format
        if memory_format == before:
            yield
            return
        self.use_memory_format(memory_format)
        try:
            yield
        finally:
            self.use_memory_format(before)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        """Return the number of foreground classes."""
        return self.roi_heads.settings.num_classes

    @property
    def has_masks(self) -> bool:
        """Return whether the model predicts masks."""
        return self.roi_heads.mask_head is not None

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Return the :meth:`losses` of images with targets, and the detections of others (:meth:`detect`).

        Raises:
            ValueError: the model is in training mode, and there are no targets.
        """
        if targets is not None:
            return self.losses(images, targets)
        if self.training:
            raise ValueError("a model in training mode needs targets; call model.eval() to detect objects")
        return self.detect(images)

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the losses of one batch.

        Args:
            images: (3, H, W) each, 0..255 in ``INPUT.FORMAT`` order, uint8 or float, any device.
            targets: ground truth in the pixels of these images.

        Returns:
            Scalars ``loss_rpn_cls``, ``loss_rpn_loc``, ``loss_cls``, ``loss_box_reg`` and, for a model with
            masks, ``loss_mask``; training minimises their sum. A cascade has ``loss_cls_stage0``,
            ``loss_box_reg_stage0``, ``loss_cls_stage1``, ... for the two of boxes.
        """
        if static.refusal(self) is None:
            return self.static_losses(self.prepare(images, targets))
        sizes = [image_size(image) for image in images]
        targets = [target.to(self.device, non_blocking=True) for target in targets]
        features = self.backbone(self.preprocess(images))
        with record_function("rpn"):
            proposals, losses = self.proposal_generator.losses(features, sizes, targets)
        with record_function("roi_heads"):
            return losses | self.roi_heads.losses(features, proposals, targets, sizes)

    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target]) -> Inputs:
        """Bring a batch to the device for :meth:`static_losses`, without waiting for the device."""
        sizes = [image_size(image) for image in images]
        size = self._padded_size(sizes)
        padded = static.pad_targets(targets, sizes, size, self.has_masks)
        as_read = all(image.dtype == torch.uint8 and image.device.type == "cpu" for image in images)
        if not as_read or self.pixel_mean.dtype != torch.float32:
            return Inputs(self.preprocess(images), send([], padded, self.device)[-1])
        buffer, places, padded = send(images, padded, self.device)
        normalised = normalize_images(
            buffer, places, self.pixel_mean, self.pixel_std, size, self.channels_last
        )
        return Inputs(normalised, padded)

    def static_losses(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return :meth:`losses` by operators whose shapes follow from those of ``inputs`` alone."""
        with self._half_weights():
            features = self.backbone(inputs.images)
            return static.losses(self.proposal_generator, self.roi_heads, features, inputs.targets)

    def _half_weights(self) -> AbstractContextManager[None]:
        """Round the weights at once under autocast; a compiled backbone has kernels that round its own."""
        device = self.device.type
        if not torch.is_autocast_enabled(device) or self.backbone._compiled_call_impl is not None:
            return contextlib.nullcontext()
        if world_size() > 1 and not torch.cuda.is_current_stream_capturing():
            return contextlib.nullcontext()  # DDP exchanges gradients while the others are computed
        # The rows of the mask predictor are gathered, and their gradients are added in the weight's dtype.
        gathered = self.roi_heads.mask_head and self.roi_heads.mask_head.predictor
        return half_weights(self, torch.get_autocast_dtype(device), without=gathered)

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        original_sizes: Sequence[tuple[int, int]] | None = None,
        paste: bool = True,
    ) -> list[Detections]:
        """Return the best ``TEST.DETECTIONS_PER_IMAGE`` detections of each image.

        A group norm sees the padding of a batch, so images that are padded to different sizes go through the
        network one size after the other. The detections of an image do not depend on the other images.

        Args:
            images: see :meth:`losses`.
            original_sizes: (height, width) to which detections are scaled; by default those of ``images``.
            paste: see :func:`rescale`.
        """
        if original_sizes is None:
            original_sizes = [image_size(image) for image in images]
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(self._padded_size([image_size(image)]), []).append(i)
        results: dict[int, Detections] = {}
        for members in groups.values():
            found = self.find([images[i] for i in members])
            with record_function("paste_masks"):
                for i, detections in zip(members, found, strict=True):
                    results[i] = rescale(detections, image_size(images[i]), original_sizes[i], paste)
        return [results[i] for i in range(len(images))]

    @torch.no_grad()
    def find(self, images: Sequence[Tensor], masks: bool = True) -> list[Detections]:
        """Return detections in the pixels of ``images``, which are padded to one size.

        Args:
            images: see :meth:`losses`.
            masks: predict masks, (D, S, S) probabilities inside the boxes, if the model has them.
        """
        sizes = [image_size(image) for image in images]
        features = self.backbone(self.preprocess(images))
        if static.refusal(self) is None and self.num_classes <= static.MOST_CLASSES:
            return static.detect(self.proposal_generator, self.roi_heads, features, sizes, masks)
        with record_function("rpn"):
            proposals = self.proposal_generator.propose(features, sizes)
        with record_function("roi_heads"):
            return self.roi_heads.detect(features, proposals, sizes, masks)

    @torch.no_grad()
    def segment(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the masks of given objects: (D_n, S, S) probabilities inside the boxes of each image.

        Args:
            images: see :meth:`losses`; they are padded to one size.
            boxes, labels: (D_n, 4) in pixels of the image and (D_n,) classes, of each image.
        """
        return self.roi_heads.segment(self.backbone(self.preprocess(images)), boxes, labels)

    def preprocess(self, images: Sequence[Tensor]) -> Tensor:
        """Return normalised images, padded with zeros at the right and the bottom: (N, 3, H, W) float32."""
        shape = len(images), 3, *self._padded_size([image_size(image) for image in images])
        batch = self.pixel_mean.new_zeros(shape).contiguous(memory_format=self.memory_format)
        for place, pixels in zip(batch, send_images(images, self.device), strict=True):
            place[:, : pixels.shape[-2], : pixels.shape[-1]] = (pixels - self.pixel_mean) / self.pixel_std
        return batch

    def _padded_size(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        unit = self.size_divisibility
        height, width = (max(size[i] for size in sizes) for i in (0, 1))
        return -(-height // unit) * unit, -(-width // unit) * unit


def image_size(image: Tensor) -> tuple[int, int]:
    """Return (height, width) of a (C, H, W) image in pixels."""
    return image.shape[-2], image.shape[-1]


def rescale(
    detections: Detections, size: tuple[int, int], original: tuple[int, int], paste: bool = True
) -> Detections:
    """Scale detections of an image of ``size`` (height, width) to the pixels of ``original``.

    Args:
        detections: boxes in pixels of ``size``; masks (D, S, S) probabilities inside the boxes, or None.
        size: size of the network's input.
        original: size of the image file.
        paste: convert masks to bool bitmaps of the image, a byte for each pixel and object; False keeps them
            for :func:`gn_detect.ops.paste_one_by_one`.

    Returns:
        Detections on the device of ``detections``, or on the CPU if that device has no memory for the masks.
    """
    boxes = scale_boxes(detections.boxes, original[1] / size[1], original[0] / size[0])
    boxes = clip_boxes(boxes, original)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero()[:, 0]  # once, and not for each tensor
    kept = Detections(boxes, detections.scores, detections.labels, detections.masks)[keep]
    if isinstance(kept.masks, Tensor) and paste:
        kept.masks = paste_masks(kept.masks, kept.boxes, original)
        kept = kept.to(kept.masks.device)
    return kept
