"""Trained heads that ship with xattn: one folder a head, with weights, config and card."""
