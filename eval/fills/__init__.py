"""Fills, which replace removed pixels: colours, blurs, noise, inpainting and imputation."""

from xattn.eval.fills.fill import COLOURED, KINDS, blur, fill, inpaint, rise_blur
from xattn.eval.fills.imputation import impute

__all__ = ["COLOURED", "KINDS", "blur", "fill", "impute", "inpaint", "rise_blur"]
