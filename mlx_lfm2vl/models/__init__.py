"""The network: configuration, layers, caches, vision tower, projector, language model."""
