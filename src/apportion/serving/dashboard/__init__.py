"""The page at `/`: a chat playground and a live view of the server, as static files and one JSON endpoint. No build step."""
