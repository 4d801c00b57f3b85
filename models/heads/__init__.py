"""Trained heads that ship with xattn, each in a folder with weights, config and model card."""
