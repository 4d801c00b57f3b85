"""The script that Streamlit runs for every view and every click."""

from xattn.app.main import main

main()
