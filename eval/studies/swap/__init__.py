"""The swap study in parts: its rows, controls, networks, what is measured of each, and the report."""
