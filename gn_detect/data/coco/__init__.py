"""COCO annotation files.

A file goes through :mod:`.reader` (JSON), :mod:`.canonical` (the forms that tools write become COCO's),
:mod:`.rules` (checks) and :mod:`.dataset` (arrays for training). The evaluation and the doctor take the first
three of these steps, too.
"""
