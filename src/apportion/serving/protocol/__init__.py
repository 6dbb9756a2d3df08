"""What clients send and are sent: one module per family of the API."""
