"""The pages the API serves itself: `index.html` (the console, `/`) and `docs.html` (the API's documentation, `/docs`).

Each is one file without external assets, so that they work where nothing outside the host can be reached.
"""
