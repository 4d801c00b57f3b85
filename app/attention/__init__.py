"""The attention of one image: how it is read, pictured and charted."""
