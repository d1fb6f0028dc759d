"""kvfold inside SGLang."""
