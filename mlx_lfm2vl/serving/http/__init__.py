"""OpenAI's protocol over a worker, on starlette."""
