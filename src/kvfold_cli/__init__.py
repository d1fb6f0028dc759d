"""The command `kvfold`: one module for each subcommand.

A package beside `kvfold`, which imports torch: the command imports kvfold only when a subcommand runs, so help needs no torch.
"""
