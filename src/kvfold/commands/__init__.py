"""The commands of `kvfold`, one module each; `cli.py` registers them."""
