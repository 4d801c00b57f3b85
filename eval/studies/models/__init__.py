"""Networks and generated data that only studies use."""
