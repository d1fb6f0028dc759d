"""Adapters that let other people's models and engines run on kvfold. Import the one you need."""
