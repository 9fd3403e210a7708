"""Online: the HTTP service. One request pins one generation and reads only local memory."""
