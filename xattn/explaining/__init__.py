"""Explain photos and clips: the maps of their top or named classes."""

from xattn.explaining.clips import VideoExplanations, explain_video
from xattn.explaining.photos import Explanations, explain

__all__ = ["Explanations", "VideoExplanations", "explain", "explain_video"]
