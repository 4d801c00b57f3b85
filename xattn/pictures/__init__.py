"""Maps for the eye: colours, overlays, scales, lettering and contact sheets."""
