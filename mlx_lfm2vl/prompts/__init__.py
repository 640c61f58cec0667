"""From messages and images to a prompt."""
