"""Where Streamlit's script lies: beside it there must be no folder ``pages``, which Streamlit takes
for pages of its own and runs as scripts."""
