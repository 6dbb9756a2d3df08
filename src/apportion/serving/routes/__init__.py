"""One router per family of the API."""
