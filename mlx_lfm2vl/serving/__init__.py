"""What remembers between questions: prefixes, sessions, workers, folders."""
