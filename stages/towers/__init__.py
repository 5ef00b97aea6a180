"""The mini towers: trained from scratch, halved, and shipped."""
