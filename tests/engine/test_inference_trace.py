"""Copies of an evaluation on a pretended GPU: one a batch, sent before the batch ahead of it is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.pretended_device import DEVICE, Pretended, copies, pretended_device, waits
from benchmarks.step_trace import make_batch
from gn_detect.config import Config, load_config
from gn_detect.evaluation import model as evaluation
from gn_detect.modeling import MaskRCNN, build_model, inputs
from gn_detect.structures import Sample
from tests.engine.tiny import write_config

SIZE = (64, 96)
OF_IMAGES = ("modeling/inputs.py", "_copy", "pinned")
OF_LIMITS = ("modeling/static.py", "detect", "pinned")  # sizes of the images


@dataclass
class Stream:
    """Notes in which order streams copy, wait and compute."""

    name: str
    log: list[tuple[Any, ...]]
    events: list[object] = field(default_factory=list)

    def record_event(self) -> int:
        self.log.append(("copy", len(self.events)))
        self.events.append(object())
        return len(self.events) - 1

    def wait_event(self, event: int) -> None:
        self.log.append(("wait", event))


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config(write_config(tmp_path_factory.mktemp("trace"))).replace({"MODEL.WEIGHTS": ""})


def make_batches() -> list[list[Sample]]:
    """Three batches, the last one smaller, of images of two sizes in one padded size."""
    first, second = make_batch([0, 0], SIZE, 2, seed=0), make_batch([0, 0], (60, 90), 2, seed=1)
    return [[first[0], second[0]], second, make_batch([0], SIZE, 2, seed=2)]


def on_host(image: Tensor) -> Tensor:
    assert isinstance(image, Pretended)
    return image.host


@contextmanager
def logged_streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    log: list[tuple[Any, ...]] = []
    present, own = Stream("present", log), Stream("copies", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: present)
    monkeypatch.setattr(inputs, "_stream_of_copies", lambda _: own)
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: log.append(("kept for", stream.name)))
    yield log


def test_each_batch_is_copied_once_and_ahead(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # pretended tensors do not know it
    with pretended_device() as trace, logged_streams(monkeypatch) as log:
        model = build_model(cfg).to(DEVICE).eval()
        find = MaskRCNN.find

        def logged(self: MaskRCNN, *args: Any) -> Any:
            log.append(("compute",))
            return find(self, *args)

        monkeypatch.setattr(MaskRCNN, "find", logged)
        entries: list[Any] = []
        found = trace.record(
            lambda: entries.extend(evaluation._detect(model, make_batches(), list(range(2)), None))
        )
    kept = ("kept for", "present")
    assert log == [
        ("copy", 0), ("copy", 1), ("wait", 0), kept, ("compute",),
        ("copy", 2), ("wait", 1), kept, ("compute",),
        ("wait", 2), kept, ("compute",),
    ]  # fmt: skip
    assert copies(found) == Counter({OF_IMAGES: 3, OF_LIMITS: 3})
    assert waits(found)[OF_IMAGES[:2]] == 0
    assert waits(found)[OF_LIMITS[:2]] == 3  # the numbers of detections of each batch
    assert len(entries) == 5


def test_images_sent_ahead_keep_every_bit(cfg: Config) -> None:
    batches = make_batches()
    with pretended_device():
        sent = list(inputs.send_ahead(batches, DEVICE))
        assert all(sample.image.device == DEVICE for batch in sent for sample in batch)
        for batch, expected in zip(sent, batches, strict=True):
            for sample, original in zip(batch, expected, strict=True):
                assert torch.equal(on_host(sample.image), original.image)
                assert sample.original_size == original.original_size


def test_images_of_any_type_share_the_buffer() -> None:
    images = [torch.rand(3, 5, 7), torch.arange(48, dtype=torch.uint8).view(3, 4, 4)]
    with pretended_device() as trace:
        found: list[Tensor] = []
        events = trace.record(lambda: found.extend(inputs.send_images(images, DEVICE)))
        again = trace.record(lambda: inputs.send_images(found, DEVICE))
    assert copies(events) == {OF_IMAGES: 1}
    assert not copies(again)
    for ours, theirs in zip(found, images, strict=True):
        assert torch.equal(on_host(ours), theirs)


def test_a_cpu_gets_its_batches_as_they_are() -> None:
    batches = make_batches()
    assert all(a is b for a, b in zip(inputs.send_ahead(batches, torch.device("cpu")), batches, strict=True))
    images = [sample.image for sample in batches[0]]
    assert all(a is b for a, b in zip(inputs.send_images(images, torch.device("cpu")), images, strict=True))
