"""Reports of results: tables, JSON and CSV files, the leaderboard with its page and pack."""
