"""Evaluates explanations in one stream of forward passes and stores the results, so that a killed run can
be resumed."""
