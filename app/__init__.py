"""The Streamlit viewer of xattn: views only, no maths. It has not landed yet."""
