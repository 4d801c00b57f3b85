"""Photos and clips that somebody uploads, explained while the page waits."""
