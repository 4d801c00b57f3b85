"""What Streamlit runs for every view and every click: ``streamlit run app/script/run.py``."""

from xattn.app.main import main

main()
