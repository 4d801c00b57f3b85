"""The demo: ``python -m xattn.app.demo.run``, and the demo pack that the viewer offers."""
