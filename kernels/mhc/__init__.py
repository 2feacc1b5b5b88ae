"""TileLang definitions: one file per op. A builder takes numbers and returns a kernel."""
