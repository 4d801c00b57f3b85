"""What every part needs of the machine: files, locks, memory, signals, processes, strict readers."""
