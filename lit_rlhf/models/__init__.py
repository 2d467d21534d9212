"""Hugging Face models in their four roles: actor, critic, reference, reward model."""
