"""Turn rows into batches: records, conversations, lengths, collators, packing, batching."""
