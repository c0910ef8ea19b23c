"""What any artifact is, what it was made from, and what it holds."""
