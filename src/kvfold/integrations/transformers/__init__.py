"""kvfold in DeepSeek-V4 models of Hugging Face transformers."""
