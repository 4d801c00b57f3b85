"""The Streamlit viewer of xattn, ``xattn app``: views only, no maths."""
