"""The server of ``xattn app``: addresses, pictures, access token and limits."""
