"""Pictures of maps: colours, overlays, scales, lettering and contact sheets."""
