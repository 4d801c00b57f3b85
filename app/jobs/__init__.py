"""Training jobs: processes that outlive the server, recorded in folders."""
