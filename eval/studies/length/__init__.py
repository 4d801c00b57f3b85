"""Parts of the length study: its tasks, its network, and its report."""
