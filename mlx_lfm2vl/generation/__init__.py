"""From a prompt to an answer: sampling, decoding, the engine."""
