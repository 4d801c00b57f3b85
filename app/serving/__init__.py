"""The server of ``xattn app``, with its routes, access token and limits."""
