"""Annotation formats other than COCO."""
