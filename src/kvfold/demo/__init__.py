"""What `kvfold demo` shows: a small DeepSeek-V4 whose compressors are kvfold."""
