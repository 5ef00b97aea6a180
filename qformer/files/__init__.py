"""Files: tensors, records that appear whole or not at all, checksums, released weights and the folders of others."""
