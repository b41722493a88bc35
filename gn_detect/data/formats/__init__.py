"""Annotation formats other than COCO: each is recognised, and most are read into COCO content."""
