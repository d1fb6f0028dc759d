"""kvfold inside TensorRT-LLM."""
