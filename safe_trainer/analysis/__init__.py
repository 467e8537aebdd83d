"""What data would teach, and what a fine-tune changed."""
