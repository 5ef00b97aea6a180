"""The mini towers: trained from scratch, converted to fp16, and shipped."""
