"""A model behind HTTP, by OpenAI's protocol, and in the terminal: many requests share each step of it."""
