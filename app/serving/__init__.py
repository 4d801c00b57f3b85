"""The server of ``xattn app``: addresses, pictures, token and limits."""
