"""Packs: folders that hold many explanations. The record, the writer and the reader."""
