"""Services for all packages: files, locks, memory, signals, processes, strict readers."""
