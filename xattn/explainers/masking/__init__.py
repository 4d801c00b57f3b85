"""Methods that pass masked images through the network, one per file."""
