"""kvfold inside vLLM."""
