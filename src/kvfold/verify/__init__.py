"""The self-test that `kvfold verify` runs: fixed cases, and random ones."""
