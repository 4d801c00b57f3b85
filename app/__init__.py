"""The Streamlit viewer ``xattn app``, which shows results and leaves all computations to other packages."""
