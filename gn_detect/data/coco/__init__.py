"""COCO annotation files: one reader, one set of rules, the dataset."""
