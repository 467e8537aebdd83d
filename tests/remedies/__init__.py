"""What is refused, by subject, with the words of the message and what they advise."""
