"""What plays and learns."""
