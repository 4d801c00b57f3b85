"""The Streamlit viewer of xattn, ``xattn app``; it shows results and computes none itself."""
