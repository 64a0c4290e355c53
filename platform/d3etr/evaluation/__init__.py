"""Measuring detectors: detections from decoder outputs, COCO's mAP over all workers, stability.

``evaluator`` runs a detector over a split, ``postprocess`` makes detections of its outputs, and
``coco_metrics`` computes mAP from them.
"""
