"""The parts of the swap study: its rows, controls, networks, measurements and report."""
