"""The demo: ``python -m xattn.app.demo``, and the demo pack that the viewer offers."""
