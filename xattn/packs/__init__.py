"""Packs, folders that contain many explanations: the record of one explanation, the writer and the
reader."""
