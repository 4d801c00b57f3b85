"""Reports of results: tables, JSON and CSV files, and the leaderboard with its page and pack."""
