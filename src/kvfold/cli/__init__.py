"""The command `kvfold`: one module for each subcommand."""
