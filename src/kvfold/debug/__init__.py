"""Looking into one call: compare it with the references, write it to a file, make it again."""
