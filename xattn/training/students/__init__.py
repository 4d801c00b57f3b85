"""What distillation and pruning train of a network, and how close that is to the network."""
