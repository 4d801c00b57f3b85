"""Evaluates explanations with one stream of forward passes and a state from which a killed run resumes."""
