"""Makes ``eval_fakes`` importable by the tests in the folders below."""
