"""Rows become batches: records, conversations, lengths, collators, packing, batching."""
