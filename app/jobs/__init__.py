"""Training jobs, which are processes that outlive the server; each is recorded in a folder."""
