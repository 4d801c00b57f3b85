"""Parts of the study of actions: its settings, sequences, detector and temporal average precision."""
