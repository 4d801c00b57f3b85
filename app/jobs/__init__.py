"""Training jobs: processes that outlive the server and are recorded in folders."""
