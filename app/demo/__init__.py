"""The demo of ``python -m xattn.app.demo``, and the demo pack that the viewer offers."""
