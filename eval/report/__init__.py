"""Reports results as tables, JSON and CSV files, and as a leaderboard with an HTML page and a pack."""
