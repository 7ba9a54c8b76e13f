"""A retrieval service in front of CacheClip: search, prompt, stream. Made to be copied."""
