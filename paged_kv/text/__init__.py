"""Text of people and of models: tokens, chat templates, streams."""
