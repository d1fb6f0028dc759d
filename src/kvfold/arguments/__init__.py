"""What a call may be given: types, shapes and memory of tensors, memory that two must not share, and files."""
