"""Detectors: detections in photos, and views whose classes are detections."""

from xattn.detection.candidates import Candidates, Suppression
from xattn.detection.detector import Detection, Detections, Detector
from xattn.detection.loading import load_detector
from xattn.detection.networks import CallableDetector, DetectionNetwork

__all__ = [
    "CallableDetector",
    "Candidates",
    "Detection",
    "DetectionNetwork",
    "Detections",
    "Detector",
    "Suppression",
    "load_detector",
]
