"""The folder of Streamlit's script. There must be no folder ``pages`` beside it, because Streamlit would
run that folder's files as pages."""
