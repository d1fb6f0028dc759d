"""The commands of `kvfold`, one module each; `cli/app.py` registers them."""
