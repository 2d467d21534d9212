"""Hugging Face models as actor, critic, reference and reward model."""
