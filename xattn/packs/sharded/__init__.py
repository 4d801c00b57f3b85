"""Pack format 2: columns in Parquet, maps and thumbnails in safetensors shards."""
