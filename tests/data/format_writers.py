"""Writers of other formats, for tests: they share no code with the readers of the package.

Each takes COCO content and the folder of its images, and writes a dataset into a new folder with copies of
the images.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image

Content = dict[str, Any]


def copies(content: Content, images: Path, folder: Path) -> Iterator[tuple[Content, list[Content], str]]:
    """Copy each image; yield its entry, its objects and the stem of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        shutil.copy(images / image["file_name"], folder / image["file_name"])
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        yield image, own, Path(image["file_name"]).stem


def names(content: Content) -> dict[int, str]:
    return {category["id"]: category["name"] for category in content["categories"]}


def bitmap(annotation: Content, image: Content) -> np.ndarray:
    """Return bool (H, W)."""
    mask, size = annotation["segmentation"], (image["height"], image["width"])
    if isinstance(mask, list):
        mask = coco_mask.merge(coco_mask.frPyObjects(mask, *size))
    elif isinstance(mask["counts"], list):
        mask = coco_mask.frPyObjects(mask, *size)
    return coco_mask.decode(mask).astype(bool)


def outlines(mask: np.ndarray) -> list[list[float]]:
    """Return the outer borders of a mask along the edges of its pixels, the longest first.

    The pixels are on the right hand of the way. At a corner that two pixels share the way turns right, so
    that pieces which touch at a corner are apart. The border of a hole turns to the left, and is left out.
    """
    padded = np.pad(mask, 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, x in np.argwhere(padded).tolist():
        sides = (
            ((y - 1, x), (x, y), (x + 1, y)),
            ((y, x + 1), (x + 1, y), (x + 1, y + 1)),
            ((y + 1, x), (x + 1, y + 1), (x, y + 1)),
            ((y, x - 1), (x, y + 1), (x, y)),
        )
        for other, start, end in sides:
            if not padded[other]:
                steps.setdefault(start, []).append(end)
    loops = []
    while steps:
        start = next(iter(steps))
        loop, place, way = [start], start, (0, 0)
        while True:
            ends = steps[place]
            right = (place[0] - way[1], place[1] + way[0])
            end = right if right in ends else ends[0]
            ends.remove(end)
            if not ends:
                del steps[place]
            way, place = (end[0] - place[0], end[1] - place[1]), end
            if place == start:
                break
            loop.append(place)
        xs, ys = np.array(loop).T
        twice = (xs * np.roll(ys, -1) - np.roll(xs, -1) * ys).sum()
        if twice > 0:
            loops.append([float(n) - 1 for point in loop for n in point])
    return sorted(loops, key=len, reverse=True)


def polygons(annotation: Content, image: Content) -> list[list[float]]:
    mask = annotation["segmentation"]
    return mask if isinstance(mask, list) else outlines(bitmap(annotation, image))


def write_yolo(content: Content, images: Path, folder: Path, masks: bool = True) -> Path:
    order = {category["id"]: number for number, category in enumerate(content["categories"])}
    (folder / "labels").mkdir(parents=True)
    for image, objects, stem in copies(content, images, folder / "images"):
        w, h, lines = image["width"], image["height"], []
        for annotation in objects:
            if masks:
                flat = polygons(annotation, image)[0]
                numbers = [n / (h if place % 2 else w) for place, n in enumerate(flat)]
            else:
                x, y, bw, bh = annotation["bbox"]
                numbers = [(x + bw / 2) / w, (y + bh / 2) / h, bw / w, bh / h]
            lines.append(" ".join([str(order[annotation["category_id"]]), *(f"{n:.9f}" for n in numbers)]))
        (folder / "labels" / f"{stem}.txt").write_text("\n".join(lines))
    classes = "".join(f"  {order[key]}: {json.dumps(name)}\n" for key, name in names(content).items())
    (folder / "data.yaml").write_text(f"train: images\nnc: {len(order)}\nnames:\n{classes}")
    return folder


def write_voc(content: Content, images: Path, folder: Path) -> Path:
    (folder / "Annotations").mkdir(parents=True)
    for image, objects, stem in copies(content, images, folder / "JPEGImages"):
        text = ""
        for annotation in objects:
            x, y, w, h = annotation["bbox"]
            box = {"xmin": round(x) + 1, "ymin": round(y) + 1, "xmax": round(x + w), "ymax": round(y + h)}
            box |= {"xmax": max(box["xmin"], box["xmax"]), "ymax": max(box["ymin"], box["ymax"])}
            inner = "".join(f"<{key}>{value}</{key}>" for key, value in box.items())
            label = names(content)[annotation["category_id"]]
            text += f"<object><name>{label}</name><bndbox>{inner}</bndbox></object>\n"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        (folder / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{image['file_name']}</filename>{size}{text}</annotation>"
        )
    return folder


def write_labelme(content: Content, images: Path, folder: Path) -> Path:
    for image, objects, stem in copies(content, images, folder):
        shapes = []
        for number, annotation in enumerate(objects):
            label, mask = names(content)[annotation["category_id"]], annotation["segmentation"]
            if isinstance(mask, list):
                for flat in mask:
                    points = [[flat[i], flat[i + 1]] for i in range(0, len(flat), 2)]
                    shapes.append(
                        {"label": label, "points": points, "shape_type": "polygon", "group_id": number}
                    )
                continue
            pixels = bitmap(annotation, image)
            ys, xs = np.nonzero(pixels)
            x0, x1, y0, y1 = xs.min(), xs.max(), ys.min(), ys.max()
            file = io.BytesIO()
            Image.fromarray(pixels[y0 : y1 + 1, x0 : x1 + 1]).save(file, "PNG")
            points = [[float(x0), float(y0)], [float(x1), float(y1)]]
            coded = base64.b64encode(file.getvalue()).decode()
            shapes.append({"label": label, "points": points, "shape_type": "mask", "mask": coded})
        side = {"imageHeight": image["height"], "imageWidth": image["width"], "imageData": None}
        head = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image["file_name"]}
        (folder / f"{stem}.json").write_text(json.dumps(head | side))
    return folder


def write_cvat(content: Content, images: Path, folder: Path) -> Path:
    labels = "".join(f"<label><name>{name}</name></label>" for name in names(content).values())
    text = f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>\n"
    for image, objects, _ in copies(content, images, folder / "images"):
        shapes = ""
        for number, annotation in enumerate(objects, 1):
            label = f"label={quoteattr(names(content)[annotation['category_id']])}"
            mask = annotation["segmentation"]
            if isinstance(mask, list):
                for flat in mask:
                    points = ";".join(f"{flat[i]},{flat[i + 1]}" for i in range(0, len(flat), 2))
                    shapes += f'<polygon {label} points="{points}" z_order="0" group_id="{number}"/>\n'
                continue
            pixels = bitmap(annotation, image)
            ys, xs = np.nonzero(pixels)
            part = pixels[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            runs, value = [0], False
            for pixel in part.ravel().tolist():
                if pixel == value:
                    runs[-1] += 1
                else:
                    runs.append(1)
                    value = pixel
            place = f'left="{xs.min()}" top="{ys.min()}" width="{part.shape[1]}" height="{part.shape[0]}"'
            shapes += f'<mask {label} rle="{", ".join(map(str, runs))}" {place} z_order="0"/>\n'
        size = f'width="{image["width"]}" height="{image["height"]}"'
        text += f'<image id="{image["id"]}" name="{image["file_name"]}" {size}>\n{shapes}</image>\n'
    (folder / "annotations.xml").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{text}</annotations>')
    return folder


def write_via(content: Content, images: Path, folder: Path) -> Path:
    entries = {}
    for image, objects, _ in copies(content, images, folder):
        regions = []
        for annotation in objects:
            flat = polygons(annotation, image)[0]
            shape = {"name": "polygon", "all_points_x": flat[0::2], "all_points_y": flat[1::2]}
            attributes = {"class": names(content)[annotation["category_id"]]}
            regions.append({"shape_attributes": shape, "region_attributes": attributes})
        key = f"{image['file_name']}123"
        entries[key] = {
            "filename": image["file_name"],
            "size": 123,
            "regions": regions,
            "file_attributes": {},
        }
    project = {"_via_settings": {}, "_via_img_metadata": entries, "_via_attributes": {}}
    (folder / "via.json").write_text(json.dumps(project))
    return folder


def pack_runs(values: np.ndarray) -> list[int]:
    """Encode bytes as Label Studio's brush does: words of 8 bits, runs of one value alone."""
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 8, 12, 16))
    ends = np.append(np.flatnonzero(np.diff(values)) + 1, len(values))
    start = 0
    for end in ends.tolist():
        while start < end:
            count = min(end - start, 1 << 16)
            bits += "111" + f"{count - 1:016b}" + f"{values[start]:08b}"
            start += count
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def write_label_studio(content: Content, images: Path, folder: Path) -> Path:
    tasks = []
    for image, objects, _ in copies(content, images, folder / "upload"):
        w, h, results = image["width"], image["height"], []
        for annotation in objects:
            label, mask = names(content)[annotation["category_id"]], annotation["segmentation"]
            if isinstance(mask, list):
                flat = mask[0]
                points = [[100 * flat[i] / w, 100 * flat[i + 1] / h] for i in range(0, len(flat), 2)]
                kind, value = "polygonlabels", {"points": points}
            else:
                alpha = bitmap(annotation, image).astype(np.uint8) * 255
                pixels = np.stack([alpha, alpha, alpha, alpha], axis=-1).ravel()
                kind, value = "brushlabels", {"format": "rle", "rle": pack_runs(pixels)}
            value[kind] = [label]
            size = {"original_width": w, "original_height": h, "image_rotation": 0}
            results.append({"type": kind, "value": value, "from_name": "l", "to_name": "image", **size})
        url = f"/data/upload/1/0a1b2c3d-{image['file_name']}"
        tasks.append(
            {"id": image["id"], "data": {"image": url}, "annotations": [{"id": 1, "result": results}]}
        )
    (folder / "export.json").write_text(json.dumps(tasks))
    return folder


def write_mask_files(content: Content, images: Path, folder: Path) -> Path:
    """One PNG for each object, as the Data Science Bowl 2018 has them."""
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        place = folder / Path(image["file_name"]).stem
        (place / "images").mkdir(parents=True)
        (place / "masks").mkdir()
        shutil.copy(images / image["file_name"], place / "images" / image["file_name"])
        for number, annotation in enumerate(own):
            pixels = bitmap(annotation, image).astype(np.uint8) * 255
            Image.fromarray(pixels).save(place / "masks" / f"{number:04d}.png")
    return folder


def write_mask_values(content: Content, images: Path, folder: Path) -> Path:
    """One PNG for each image, with a value for each object."""
    (folder / "masks").mkdir(parents=True)
    for image, objects, stem in copies(content, images, folder / "images"):
        values = np.zeros((image["height"], image["width"]), dtype=np.uint16)
        for number, annotation in enumerate(objects, 1):
            values[bitmap(annotation, image)] = number
        Image.fromarray(values).save(folder / "masks" / f"{stem}.png")
    return folder


WRITERS: dict[str, Callable[[Content, Path, Path], Path]] = {
    "yolo": write_yolo,
    "yolo boxes": lambda content, images, folder: write_yolo(content, images, folder, masks=False),
    "voc": write_voc,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "via": write_via,
    "label-studio": write_label_studio,
    "masks files": write_mask_files,
    "masks values": write_mask_values,
}
