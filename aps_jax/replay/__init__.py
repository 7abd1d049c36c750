"""What is remembered, on the device."""
