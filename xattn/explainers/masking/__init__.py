"""Methods that pass masked images through the network, one a file."""
