"""The server of ``xattn app``: addresses, pictures, login and limits."""
